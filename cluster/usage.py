"""What this process has used, as the operating system counts it. Any thread."""

from __future__ import annotations

import os
import resource
import sys
import time

import psutil

READ_AGAIN_S = 1.0  # statuses go out more often; reading /proc each time would cost more than the rest


def peak_rss_bytes() -> int:
    """The largest resident set so far."""
    return _rss_bytes()[1]


def rss_bytes() -> int:
    """The resident set now."""
    return _rss_bytes()[0]


def _rss_bytes() -> tuple[int, int]:
    """The resident set, now and at its largest.

    On Linux from /proc/self/status: getrusage's value there starts with that of the process that started us.
    """
    if sys.platform == "linux":
        found = {}
        with open("/proc/self/status") as status:
            for line in status:
                key, _, value = line.partition(":")
                if key in ("VmRSS", "VmHWM"):
                    found[key] = int(value.split()[0]) * 1024
        if len(found) == 2:
            return found["VmRSS"], found["VmHWM"]
    now = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return now, peak if sys.platform == "darwin" else peak * 1024


class Usage:
    """CPU time, and memory that is read at most once in READ_AGAIN_S."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._rss_bytes = self._peak_rss_bytes = 0

    @property
    def peak_rss_bytes(self) -> int:
        """As `peak_rss_bytes`."""
        self._refresh()
        return self._peak_rss_bytes

    @property
    def rss_bytes(self) -> int:
        """The resident set."""
        self._refresh()
        return self._rss_bytes

    @property
    def cpu_s(self) -> float:
        """User and system time of all threads so far."""
        times = os.times()
        return times.user + times.system

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read_at >= READ_AGAIN_S:
            self._read_at = now
            self._rss_bytes, self._peak_rss_bytes = _rss_bytes()
