"""What a ring's processes hold while a soak goes on, and whether it grows."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import psutil

from planner.plan import Plan
from tests.ring_processes import RingProcesses

COUNTED = 0.001  # of the plan's bytes: each row's offset and padding are counted too


@dataclass(slots=True)
class Series:
    """One measure of one process over time."""

    times_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def growth(self) -> float:
        """Of the second half: the least-squares slope times its length."""
        half = len(self.times_s) // 2
        times, values = np.array(self.times_s[half:]), np.array(self.values[half:])
        away = times - times.mean()
        square = float(away @ away)
        return float(away @ values) / square * float(times[-1] - times[0]) if square else 0.0


class Watch:
    """A thread that measures every `every_s`: with `with Watch(...)` it runs."""

    def __init__(self, ring: RingProcesses, plan: Plan, every_s: float) -> None:
        self._ring, self._every_s = ring, every_s
        self._kv_planned = {part.rank: part.kv_bytes for part in plan.assignments}
        self.series: dict[tuple[str, str], Series] = {}  # by process and measure
        self.over_plan: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self._measure(time.monotonic())

    def _measure(self, now: float) -> None:
        for name, process in processes(self._ring).items():
            with process.oneshot():
                found = {
                    "rss MB": process.memory_info().rss / 1e6,
                    "threads": process.num_threads(),
                    "files": process.num_fds(),
                }
            for measure, value in found.items():
                self._note(name, measure, now, value)
        for rank, planned in self._kv_planned.items():
            nbytes = self._ring.node_status(rank).kv_bytes
            self._note(f"rank {rank}", "KV bytes", now, nbytes)
            if nbytes > planned * (1 + COUNTED):
                self.over_plan.append(f"rank {rank} holds {nbytes} bytes of KV, planned are {planned}")

    def _note(self, name: str, measure: str, now: float, value: float) -> None:
        series = self.series.setdefault((name, measure), Series())
        series.times_s.append(now)
        series.values.append(value)

    def table(self) -> str:
        """First, last, least and most of the second half, and the growth over it."""
        lines = []
        for (name, measure), series in self.series.items():
            late = series.values[len(series.values) // 2 :]
            lines.append(
                f"{name:8} {measure:9} first {series.values[0]:.6g} last {late[-1]:.6g} "
                f"least {min(late):.6g} most {max(late):.6g} growth {series.growth():+.3g}"
            )
        return "\n".join(lines)


def processes(ring: RingProcesses) -> dict[str, psutil.Process]:
    """The nodes, and the HTTP process."""
    found = {f"rank {rank}": psutil.Process(process.pid) for rank, process in ring.processes.items()}
    for child in found["rank 0"].children(recursive=True):
        found["http"] = child
    return found


def held(ring: RingProcesses) -> dict[str, tuple[int, int]]:
    """Threads and open files of each process."""
    return {name: (p.num_threads(), p.num_fds()) for name, p in processes(ring).items()}
