"""Keeps a Mac awake while a node of it serves: one `caffeinate` beside the node. Main thread only.

caffeinate(8) is in every macOS. -i: no idle sleep. -s: no sleep at all on mains power. Never -d: the display
may go dark. -w: it ends with the node, however that ends. A lid that is shut still sends a laptop to sleep.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence

CAFFEINATE = "/usr/bin/caffeinate"
STOP_S = 0.3

log = logging.getLogger(__name__)


def caffeinate_command(pid: int) -> tuple[str, ...]:
    """What keeps this machine awake while the process lives; empty where nothing need: not on macOS."""
    return (CAFFEINATE, "-i", "-s", "-w", str(pid)) if sys.platform == "darwin" else ()


class KeepAwake:
    """The process that holds sleep off, from `start` to `close`. Nothing it meets stops the node."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Once; a machine that cannot be kept awake is a warning."""
        if not self._command:
            return
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is the node's to answer
            )
        except OSError as error:
            program, why = self._command[0], error.strerror
            log.warning("this machine may fall asleep: %s cannot be run: %s", program, why)

    def close(self) -> None:
        """Sleep is allowed again."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
