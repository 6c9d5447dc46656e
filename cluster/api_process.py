"""Keeps the HTTP process of rank 0 running: starts it, waits for its ready line, restarts it if it dies."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from cluster.logs import RELAYED

RESTART_S = (0.5, 1.0, 2.0, 5.0)
READY = "API_READY"
FAILED = "API_FAILED"


class ApiProcess:
    """One supervised `python -m cluster.api`. It ends by itself when its standard input does.

    `on_ready(host, port)` each time it listens; `on_failed(reason)` if the first start fails; `on_log(text)`
    for each line of its log.
    """

    def __init__(
        self,
        config: Path,
        model: str,
        head: str,
        *,
        on_ready: Callable[[str, int], None],
        on_failed: Callable[[str, int], None],
        say: Callable[[str], None],
        on_log: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._on_log = on_log
        self._command = [
            sys.executable,
            "-m",
            "cluster.api",
            "--config",
            str(config),
            f"--model={model}",
            "--head",
            head,
            "--parent-pipe",
        ]
        self._on_ready, self._on_failed, self._say = on_ready, on_failed, say
        self._stopping = threading.Event()
        self._was_ready = False
        self._sentence = ""  # its own word on why it ends
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._supervise, name="api-process", daemon=True)

    def start(self) -> None:
        """Start the process and its supervisor thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End the process, by force after `timeout_s`."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def _supervise(self) -> None:
        num_restarts = 0
        while not self._stopping.is_set():
            with subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,  # a terminal's Ctrl-C is the node's to answer
            ) as process:
                self._process = process
                assert process.stdout is not None
                self._read(process.stdout)
                code = process.wait()
            if self._stopping.is_set():
                return
            if not self._was_ready or (self._sentence and not num_restarts):
                reason = self._sentence or f"the HTTP process ended with code {code} before it listened"
                self._on_failed(reason, code)
                return
            delay_s = RESTART_S[min(num_restarts, len(RESTART_S) - 1)]
            num_restarts += 1
            reason = f" ({self._sentence})" if self._sentence else ""
            self._say(
                f"the HTTP process ended with code {code}{reason}; starting it again in {delay_s:.1f} s"
            )
            self._sentence = ""
            self._stopping.wait(delay_s)

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            if line.startswith(RELAYED):
                self._on_log(line.removeprefix(RELAYED))
                continue
            word, *rest = line.split() or [""]
            if word == FAILED:
                self._sentence = line.removeprefix(FAILED).strip()
            elif word == READY and len(rest) == 2:
                self._was_ready = True
                self._on_ready(rest[0], int(rest[1]))
