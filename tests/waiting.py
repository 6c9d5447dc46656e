"""Waiting for a state of another thread or process, which tests do instead of sleeping. Any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE_S = 0.01
PATIENT_S = 10.0  # silence of a process that busy processors do not let run; the default is 1 s
LOADED_S = 5.0  # what a machine that others keep busy may take besides, where nothing hangs


def is_in_time(took_s: float, limit_s: float) -> bool:
    """Whether what is promised within `limit_s` did not hang; what a loaded machine adds is excused."""
    return took_s < limit_s + LOADED_S


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0, what: str = "") -> float:
    """Seconds until `condition` holds; fails when that is not in time, saying what did not happen."""
    began = time.monotonic()
    pause = threading.Event()
    while not condition():
        assert is_in_time(time.monotonic() - began, timeout_s), (
            f"not in {timeout_s} s: {what or 'what was waited for'}"
        )
        pause.wait(PAUSE_S)
    return time.monotonic() - began
