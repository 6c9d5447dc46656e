"""What this process has used, as the operating system counts it. Any thread."""

from __future__ import annotations

import os
import resource
import sys
import time

READ_AGAIN_S = 1.0  # statuses go out more often; reading /proc each time would cost more than the rest


def peak_rss_bytes() -> int:
    """The largest resident set so far.

    On Linux from /proc/self/status: getrusage's value there starts with that of the process that started us.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Usage:
    """CPU time, and peak memory that is read at most once in READ_AGAIN_S."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._peak_rss_bytes = 0

    @property
    def peak_rss_bytes(self) -> int:
        """As `peak_rss_bytes`."""
        now = time.monotonic()
        if now - self._read_at >= READ_AGAIN_S:
            self._read_at, self._peak_rss_bytes = now, peak_rss_bytes()
        return self._peak_rss_bytes

    @property
    def cpu_s(self) -> float:
        """User and system time of all threads so far."""
        times = os.times()
        return times.user + times.system
