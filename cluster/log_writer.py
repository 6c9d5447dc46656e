"""Writes lines on a thread of its own: a full pipe or disk never holds up who logs."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from queue import Full, Queue

from cluster.console import say
from cluster.log_line import LogLine

MAX_WAITING = 4096  # lines
MAX_FILE_BYTES = 10_000_000
NUM_OLD_FILES = 5


class LogWriter:
    """Hands lines to `write`, which may block or raise OSError. Those beyond MAX_WAITING are lost."""

    def __init__(self, write: Callable[[LogLine], None], *, name: str) -> None:
        self._write, self._name = write, name
        self._waiting: Queue[LogLine | None] = Queue(MAX_WAITING)
        self._lock = threading.Lock()  # guards what follows
        self._num_lost = 0
        self._is_broken = False
        self._thread = threading.Thread(target=self._run, name=f"log to {name}", daemon=True)
        self._thread.start()

    def __call__(self, line: LogLine) -> None:
        """Take a line; never blocks."""
        try:
            self._waiting.put_nowait(line)
        except Full:
            self._lose(1)

    def close(self, timeout_s: float) -> None:
        """Write what waits, as far as the time allows."""
        with contextlib.suppress(Full):
            self._waiting.put_nowait(None)
        self._thread.join(timeout_s)

    def _lose(self, count: int) -> None:
        with self._lock:
            self._num_lost += count

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                if lost := self._num_lost:
                    self._write(_lost(line, lost))
                    self._lose(-lost)
                self._write(line)
                self._is_broken = False
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._lose(1)
                if not self._is_broken:
                    self._is_broken = True
                    say(f"the log cannot be written to {self._name} ({error}); lines are lost until it can")


def _lost(line: LogLine, count: int) -> LogLine:
    return LogLine(line.time_s, "warning", __name__, f"{count} lines before this one were lost")


class RotatingFile:
    """A log file, renamed to .1, .2, ... when it has MAX_FILE_BYTES. Raises OSError if it cannot be."""

    def __init__(self, path: Path, form: Callable[[LogLine], str]) -> None:
        self._form = form
        self._handler = _Raising(
            path,
            maxBytes=MAX_FILE_BYTES,
            backupCount=NUM_OLD_FILES,
            encoding="utf-8",
            errors="backslashreplace",
        )

    def __call__(self, line: LogLine) -> None:
        """Append a line."""
        self._handler.emit(logging.makeLogRecord({"msg": "%s", "args": (self._form(line),)}))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is lost; that was told
            self._handler.close()


class _Raising(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise  # noqa: PLE0704  # the error that logging caught
