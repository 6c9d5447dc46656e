"""Better orders of many nodes, by moving a few at a time. Pure; seeded and counted, so always the same.

Each order is worth its cheapest ring, as planner/one_order.py finds it; here only the cost is needed, and
only from the first node that moved on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from planner.any_order import TIE, Ring
from planner.bands import band_by_stop, width_of

NUM_MOVES = 400  # of orders of 32 nodes; less of longer ones
MAX_SEGMENT = 3  # nodes that move together


def reorder(ring: Ring, order: Sequence[int]) -> list[int]:
    """An order of the same nodes whose cheapest ring costs no more. Forced nodes stay out of it."""
    trials = _Trials(ring, order)
    rng = random.Random(0)
    best, least = list(range(len(order))), trials.cost(range(len(order)), 0)
    for _ in range(NUM_MOVES * 32 // max(32, len(order))):
        moved = _moved(rng, best)
        first = next((p for p, (a, b) in enumerate(zip(best, moved, strict=True)) if a != b), None)
        if first is None:
            continue
        cost = trials.cost(moved, first)
        if cost < least * (1 - TIE):
            best, least = moved, cost
            trials.keep()
    return [order[p] for p in best]


def _moved(rng: random.Random, order: Sequence[int]) -> list[int]:
    """Another order: a piece reversed in its place, or moved elsewhere."""
    moved = list(order)
    if rng.random() < 0.3:
        start, stop = sorted(rng.sample(range(len(moved) + 1), 2))
        moved[start:stop] = moved[start:stop][::-1]
        return moved
    length = rng.randint(1, min(MAX_SEGMENT, len(moved)))
    start = rng.randrange(len(moved) - length + 1)
    piece = moved[start : start + length]
    del moved[start : start + length]
    at = rng.randrange(len(moved) + 1)
    moved[at:at] = piece[::-1] if rng.random() < 0.3 else piece
    return moved


class _Trials:
    """Costs of orders of some nodes, given by their position in `nodes`."""

    def __init__(self, ring: Ring, nodes: Sequence[int]) -> None:
        rows = np.array([*nodes, ring.head])
        self._hop, self._head = ring.hop[np.ix_(rows, rows)], len(nodes)
        tables = [ring.stage(i) for i in nodes]
        width = max(width_of(table) for table in tables)
        self._band = [band_by_stop(table, width) for table in tables]  # (B, W) each
        starts = np.arange(ring.size)[:, None] - 1 - np.arange(width)[None, :]
        self._starts = np.where(starts < 0, ring.size, starts)  # (B, W); beyond the last: none
        # (N + 1, B) least cost at a boundary, of the head and of each place in the order
        self._kept = np.full((len(nodes) + 1, ring.size), np.inf)
        self._kept[0, 0] = 0.0
        self._value = self._kept.copy()

    def cost(self, order: Sequence[int], first: int) -> float:
        """The least cost of a ring in this order, of which the places before `first` are those kept."""
        value = self._value
        value[: first + 1] = self._kept[: first + 1]
        before = np.array([self._head, *order])
        arrive = np.full(value.shape[1] + 1, np.inf)
        for place in range(first, len(order)):
            node = order[place]
            hop = self._hop[before[: place + 1], node]
            arrive[:-1] = (value[: place + 1] + hop[:, None]).min(axis=0)
            value[place + 1] = (arrive[self._starts] + self._band[node]).min(axis=1)
        return float((value[:, -1] + self._hop[before, self._head]).min())

    def keep(self) -> None:
        """The last order is the one that others start from."""
        self._kept, self._value = self._value, self._kept
