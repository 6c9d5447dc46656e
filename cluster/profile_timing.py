"""A steady estimate of how long calls take on a machine that does other things too. Pure but for the clock.

What disturbs a measurement makes it longer, never shorter, and it comes and goes: so all cases run in turn,
round after round, the median of each round drops single hiccups, and the best round counts. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Clock = Callable[[], float]
WALL: tuple[Clock, ...] = (time.perf_counter,)
# For work that a CPU does on threads of this process: what other programs take away meanwhile is not counted.
# With several threads at once the processor's time is the longer one, and the clock on the wall counts.
OWN: tuple[Clock, ...] = (time.perf_counter, time.process_time)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much time a profile takes, and what it may use."""

    target_ms: float  # of one timed call, where the case can be made so large
    num_calls: int  # a round
    min_rounds: int
    max_rounds: int
    budget_s: float  # no new round begins after so long, but min_rounds always do
    pool_bytes: int  # weights of one format, at most
    disk_bytes: int
    has_all_formats: bool


FULL = Effort(10, 3, 2, 15, 13.0, 192 << 20, 256 << 20, True)
QUICK = Effort(6, 2, 2, 6, 4.0, 128 << 20, 64 << 20, False)


@dataclass(frozen=True, slots=True)
class Estimate:
    """ms of a call: the best round's median; spread: by what share the middle round was slower."""

    ms: float
    spread: float
    num_rounds: int


def measure(
    cases: Mapping[str, Callable[[], None]],
    effort: Effort,
    on_round: Callable[[int], None] = lambda _: None,
    clocks: Sequence[Clock] = WALL,
) -> dict[str, Estimate]:
    """Time each case, in turn. A call must return only when its work is done.

    Each case runs once unseen first: what is compiled, allocated or read for the first time is not timed.
    Of several clocks the one that says least counts, for each call.
    """
    for run in cases.values():
        run()
    started = clocks[0]()
    medians: dict[str, list[float]] = {name: [] for name in cases}
    for num_done in range(effort.max_rounds):
        if num_done >= effort.min_rounds and clocks[0]() - started > effort.budget_s:
            break
        for name, run in cases.items():
            medians[name].append(_round_ms(run, effort, clocks))
        on_round(num_done + 1)
    return {name: _estimate(values) for name, values in medians.items()}


def time_once_ms(run: Callable[[], None], clocks: Sequence[Clock] = WALL) -> float:
    """The second of two calls."""
    run()
    return _time_ms(run, clocks)


def _round_ms(run: Callable[[], None], effort: Effort, clocks: Sequence[Clock]) -> float:
    """The median of the round's calls; a call that takes several times the target is made once."""
    first_ms = _time_ms(run, clocks)
    if first_ms > 3 * effort.target_ms:
        return first_ms
    return median([first_ms, *(_time_ms(run, clocks) for _ in range(effort.num_calls - 1))])


def _time_ms(run: Callable[[], None], clocks: Sequence[Clock]) -> float:
    started = [clock() for clock in clocks]
    run()
    return min((clock() - then) * 1e3 for clock, then in zip(clocks, started, strict=True))


def _estimate(values: list[float]) -> Estimate:
    best = max(min(values), 1e-6)  # a clock may not move during a tiny call
    return Estimate(best, median(values) / best - 1, len(values))
