"""Lanes: requests whose rows may share frames, so that padding stays within the plan's room. Pure.

Rows that share a frame are padded to the longest of them: each counts as the widest of its lane, by the share
of a whole context that a request may come to hold. All are in one lane while half of the room is enough for
that. Beyond it a request that would pad others, or be padded, by more than its own size begins a lane, which
those that come later and are like it join. A request stays in its lane: nothing has to be taken apart for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_LANES = 3  # each has frames of its own, and a weight is read again for each


@dataclass(frozen=True, slots=True)
class Lane:
    """num_rows requests; widest: the largest share of a whole context that one of them may come to hold."""

    num_rows: int = 0
    widest: float = 0.0

    @property
    def taken(self) -> float:
        """Whole contexts that it takes of the plan's room."""
        return self.num_rows * self.widest

    def and_one(self, share: float) -> Lane:
        """With one more of that share."""
        return Lane(self.num_rows + 1, max(self.widest, share))


def lanes_of(rows: Iterable[tuple[int, float]]) -> dict[int, Lane]:
    """By number; rows: the lane and the share of each request."""
    lanes: dict[int, Lane] = {}
    for number, share in rows:
        lanes[number] = lanes.get(number, Lane()).and_one(share)
    return lanes


def taken(lanes: Mapping[int, Lane]) -> float:
    """Whole contexts that all of them take."""
    return sum(lane.taken for lane in lanes.values())


def join(lanes: Mapping[int, Lane], share: float, room: float) -> tuple[int, float]:
    """The lane of one more request, and what all take then, of `room` whole contexts."""
    before = taken(lanes)
    after = {number: before - lane.taken + lane.and_one(share).taken for number, lane in lanes.items()}
    cheapest = min(after, key=lambda number: (after[number], number), default=None)
    if cheapest is not None:
        is_alike = after[cheapest] - before <= 2 * share and after[cheapest] <= room
        if is_alike or after[cheapest] <= room / 2 or len(lanes) >= MAX_LANES:
            return cheapest, after[cheapest]
    number = next(number for number in range(len(lanes) + 1) if number not in lanes)
    return number, before + share
