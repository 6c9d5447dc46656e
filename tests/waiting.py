"""Waiting for a state of another thread or process, which tests do instead of sleeping. Any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE_S = 0.01


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0, what: str = "") -> float:
    """Seconds until `condition` holds; fails after `timeout_s`, saying what did not happen."""
    began = time.monotonic()
    pause = threading.Event()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not in {timeout_s} s: {what or 'what was waited for'}"
        pause.wait(PAUSE_S)
    return time.monotonic() - began
