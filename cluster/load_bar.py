"""The progress bar of a load or a fetch on standard error. Compute thread only."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from planner.sizes import done_of

MIN_SECONDS = 1.0  # what takes less shows nothing


class LoadBar:
    """Shows loads that take longer than MIN_SECONDS: a bar on a terminal, else a line at each tenth."""

    def __init__(self, name: str, stream: TextIO | None = None, *, verb: str = "load") -> None:
        self._name, self._stream, self._verb = name, stream or sys.stderr, verb
        self._started = time.monotonic()
        self._tenths = 0
        self._progress: Progress | None = None

    def update(self, loaded_bytes: int, total_bytes: int) -> None:
        """Called with (0, total) first, or with what an earlier fetch left, and with (total, total) last."""
        if loaded_bytes == 0:
            self._started, self._tenths = time.monotonic(), 0
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone stops no load
            self._show(loaded_bytes, total_bytes)

    def _show(self, loaded_bytes: int, total_bytes: int) -> None:
        is_done = loaded_bytes >= total_bytes
        if time.monotonic() - self._started >= MIN_SECONDS or self._progress is not None:
            if self._stream.isatty():
                self._draw(loaded_bytes, total_bytes)
            else:
                self._print(loaded_bytes, total_bytes)
        if is_done:
            self.close()

    def close(self) -> None:
        """Gives the terminal back, where it was drawn to; also of a load that broke off."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, loaded_bytes: int, total_bytes: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn(f"[{self._name}] {self._verb}ing", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._progress.add_task("load", total=total_bytes)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=loaded_bytes, total=total_bytes)

    def _print(self, loaded_bytes: int, total_bytes: int) -> None:
        tenths = 10 * loaded_bytes // max(1, total_bytes)
        if tenths > self._tenths:
            self._tenths = tenths
            print(
                f"[{self._name}] {self._verb}ed {done_of(loaded_bytes, total_bytes)}",
                file=self._stream,
                flush=True,
            )
