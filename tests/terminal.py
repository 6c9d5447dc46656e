"""A program on a terminal of its own: what a user types, and what the user sees. Main thread only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 30.0
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
_STEERING = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]|\x1b\][^\x07]*\x07")
_TAKE = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """The user's side. `seen` is all text so far, without what steers the terminal."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._raw = b""
        self._place = 0  # up to where `expect` has read

    @property
    def seen(self) -> str:
        return _STEERING.sub("", self._raw.decode("utf-8", "replace")).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._descriptor, text.encode())

    def say(self, line: str) -> None:
        """A line and Enter."""
        self.type(line + ENTER)

    def expect(self, text: str, timeout_s: float = WAIT_S) -> str:
        """Until `text` is shown after what was expected before; what came up to its end."""
        deadline = time.monotonic() + timeout_s
        while (found := self.seen.find(text, self._place)) < 0:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {text!r} in {timeout_s} s; seen: {self.seen[self._place :]!r}"
            assert self._read(left_s), f"no {text!r}, and it ended; seen: {self.seen!r}"
        begin, self._place = self._place, found + len(text)
        return self.seen[begin : self._place]

    def finish(self, timeout_s: float = WAIT_S) -> int:
        """Reads the rest; the exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"it does not end; seen: {self.seen!r}"
        return self.process.wait(WAIT_S)

    def hang_up(self, timeout_s: float = WAIT_S) -> int:
        """Close the window; the exit code of what ran in it."""
        os.close(self._descriptor)
        return self.process.wait(timeout_s)

    def _read(self, timeout_s: float) -> bool:
        """More of what is shown, or nothing in time; False at its end."""
        if not select.select([self._descriptor], [], [], max(0.0, timeout_s))[0]:
            return True
        try:
            data = os.read(self._descriptor, 65536)
        except OSError as error:  # Linux's way of saying that the other side is closed
            if error.errno == errno.EIO:
                return False
            raise
        self._raw += data
        return bool(data)


@contextmanager
def on_terminal(
    command: Sequence[str],
    *,
    columns: int = 100,
    rows: int = 60,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[Terminal]:
    """Runs the command there, killed at the end of the block if it still runs."""
    user, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE, *command],
        stdin=program,
        stdout=program,
        stderr=program,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    os.close(program)
    try:
        yield Terminal(process, user)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        with contextlib.suppress(OSError):  # hung up already
            os.close(user)
