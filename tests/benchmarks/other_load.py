"""How much of this machine's processors other work took meanwhile: what a figure is worth."""

from __future__ import annotations

import os
import resource
import time
from types import TracebackType

import psutil


class OtherLoad:
    """A context manager; afterwards `share` is of all processors, 0 to 1. Children must have ended in it."""

    share = 0.0

    def __enter__(self) -> OtherLoad:
        self._since = time.monotonic(), _busy_s(), _own_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall_s, busy_s, own_s = (
            now - then for now, then in zip((time.monotonic(), _busy_s(), _own_s()), self._since, strict=True)
        )
        self.share = max(0.0, busy_s - own_s) / (wall_s * (os.cpu_count() or 1))


def _busy_s() -> float:
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, kind, 0.0) for kind in kinds)


def _own_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
