"""Of rings that are equally good, one whose busiest stage is faster: layers spread more evenly. Pure.

For one user only the sum over the ring counts, so equal nodes may share their layers in any way; the even one
serves many users and long prompts better, and surprises nobody.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.any_order import TIE, Placed, Ring
from planner.goals import Goal

NUM_HALVINGS = 6

Found = tuple[float, list[Placed]]  # a value of the goal, and the ring that has it


def evened(found: Found, goal: Goal, ring: Ring, cheapest: Callable[[Ring], Found | None]) -> Found:
    """`found`, or a ring of the same value (but for rounding) whose longest beat is shorter.

    The least beat is found by halving, to 1/64 of the first one. cheapest: the least sum of a ring.
    """
    most = found[0] * (1 + TIE)
    high_ms, low_ms = goal.beat_ms(found[1]), 0.0
    for _ in range(NUM_HALVINGS):
        middle_ms = (low_ms + high_ms) / 2
        other = cheapest(goal.below(ring, middle_ms))
        beat_ms = goal.beat_ms(other[1]) if other is not None else 0.0
        if other is not None and (other[0] if goal.value is None else goal.value(other[0], beat_ms)) <= most:
            found, high_ms = (found[0], other[1]), beat_ms
        else:
            low_ms = middle_ms
    return found
