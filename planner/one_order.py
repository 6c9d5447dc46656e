"""The cheapest ring over any subset of nodes in one order, by exact dynamic programming. Pure.

A state is (the last node, layers placed): N nodes and B boundaries give N B states and N B (N + B) steps.
Forced nodes stand at a fixed place of the layers and anywhere in the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.any_order import TIE, Placed, Ring
from planner.pairs import up
from planner.tables import Floats


def cheapest_in_order(
    ring: Ring, order: Sequence[int], tie: float = TIE
) -> tuple[float, list[Placed]] | None:
    """The least sum of stages and hops with the free nodes in `order`, and a ring that has it; None: none."""
    return _Search(ring, order, tie).best()


class _Search:
    def __init__(self, ring: Ring, order: Sequence[int], tie: float) -> None:
        self.ring, self.order, self.tie = ring, list(order), tie
        num_free, num_forced = len(self.order), len(ring.forced)
        self.rows = np.array([ring.head, *self.order], dtype=np.intp)
        self.value = np.full((num_free + 1, ring.size), np.inf, ring.hop.dtype)  # row 0: the head
        self.value[0, 0] = 0.0
        # (forced, N + 1): at the end of a forced stage, with the first n nodes of the order at most
        self.after = np.full((num_forced, num_free + 1), np.inf, ring.hop.dtype)
        for n in range(num_free + 1):
            if n:
                node = self.order[n - 1]
                arrive = self._arrive(node, n - 1)
                self.value[n] = (arrive[:, None] + ring.stage(node)).min(axis=0)
            for f, (node, start, stop) in enumerate(ring.forced):
                self.after[f, n] = self._ways(node, start, n)[1].min() + ring.stage(node)[start, stop]

    def _arrive(self, node: int, seen: int) -> Floats:
        """(B,) least cost of arriving at `node` after some of the first `seen` nodes of the order."""
        arrive = (self.value[: seen + 1] + self.ring.hop[self.rows[: seen + 1], node][:, None]).min(axis=0)
        for f, (before, _, stop) in enumerate(self.ring.forced):
            arrive[stop] = np.minimum(arrive[stop], self.after[f, seen] + self.ring.hop[before, node])
        return np.asarray(arrive)

    def _ways(self, node: int, at: int, seen: int) -> tuple[list[int], Floats]:
        """(row of `value`, or -1 - a forced stage) and cost of each way to `node` at a boundary."""
        costs = self.value[: seen + 1, at] + self.ring.hop[self.rows[: seen + 1], node]
        ends = [f for f, (_, _, stop) in enumerate(self.ring.forced) if stop == at]
        after = [self.after[f, seen] + self.ring.hop[self.ring.forced[f][0], node] for f in ends]
        ways = [*range(seen + 1), *(-1 - f for f in ends)]
        return ways, np.concatenate([costs, np.array(after, dtype=costs.dtype)])

    def best(self) -> tuple[float, list[Placed]] | None:
        last = self.ring.size - 1
        cost = self._ways(self.ring.head, last, len(self.order))[1].min()
        return (cost, self._trace(last)) if np.isfinite(cost) else None

    def _trace(self, at: int) -> list[Placed]:
        """The stages that lead to the end, from the last one back."""
        node, seen, path = self.ring.head, len(self.order), list[Placed]()
        while True:
            row = self._latest(*self._ways(node, at, seen))
            if row == 0:
                return path[::-1]
            if row < 0:
                node, start, _ = self.ring.forced[-1 - row]
            else:
                node, seen = self.order[row - 1], row - 1
                ways = self._arrive(node, seen) + self.ring.stage(node)[:, at]
                start = int(np.flatnonzero(ways <= up(ways.min(), self.tie))[0])
            path.append(Placed(node, start, at))
            at = start

    def _latest(self, ways: Sequence[int], costs: Floats) -> int:
        """Of the cheapest ways the one from the latest node."""
        tied = np.flatnonzero(costs <= up(costs.min(), self.tie)).tolist()
        return max((ways[t] for t in tied), key=lambda way: (way < 0, way))
