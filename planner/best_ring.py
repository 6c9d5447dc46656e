"""The ring whose sum over stages and hops and whose slowest stage are best together, by bisection. Pure.

Throughput and the time to the first token are functions of those two numbers and grow with both. Of the
rings whose slowest stage stays below a limit the one with the least sum is best but for its slowest stage;
what is left is to find the limit, with bounds that prove the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from planner.any_order import Placed
from planner.tables import Floats

# (limit of the slowest stage) -> least sum and its stages; None: no ring
LeastSum = Callable[[float], tuple[float, list[Placed]] | None]
Value = Callable[[float, float], float]  # of (sum, slowest stage), growing with both
SMALLEST_GAIN = 1e-12  # below it two values are one, summed in another order


def best_ring(
    least_sum: LeastSum,
    slowest: Callable[[Sequence[Placed]], float],
    value: Value,
    limits: Floats,
    max_calls: int | None = None,
) -> tuple[float, list[Placed]] | None:
    """The least value and its ring; None: no ring. `limits`: all times of a stage, ascending, each once.

    Every interval [low, high] of limits has a lower bound on its rings' values: that of the least sum below
    its highest limit and of its lowest limit. The interval with the least bound is halved until none is
    below the best ring that was found, or until `max_calls` calls.
    """
    found = least_sum(np.inf)
    if found is None:
        return None
    best = (value(found[0], slowest(found[1])), found[1])
    high = int(np.searchsorted(limits, slowest(found[1]))) - 1
    intervals = [(found[0], 0, high)] if high >= 0 else []  # (least sum, low, high)
    calls = itertools.count(1)
    while intervals and next(calls) != max_calls:
        total, low, high = min(intervals, key=lambda i: value(i[0], float(limits[i[1]])))
        intervals.remove((total, low, high))
        if value(total, float(limits[low])) >= best[0] * (1 - SMALLEST_GAIN):
            break
        middle = (low + high) // 2
        found = least_sum(float(limits[middle]))
        if found is not None:
            own = value(found[0], slowest(found[1]))
            best = min(best, (own, found[1]), key=lambda b: b[0])
            below = int(np.searchsorted(limits, slowest(found[1]))) - 1
            intervals.append((found[0], low, below))
        intervals.append((total, middle + 1, high))
        intervals = [i for i in intervals if i[1] <= i[2]]
    return best


def all_values(tables: Iterable[Floats]) -> Floats:
    """The finite values of arrays, ascending, each once."""
    return np.unique(np.concatenate([t[np.isfinite(t)] for t in tables] or [np.zeros(0)]))
