"""The best ring for an objective: which nodes own layers, in which order, and where the cuts are. Pure.

Up to about twelve different nodes every subset and every order is searched, and the result is exact. Beyond
that the nodes stay in the order of the configuration, which is searched exactly, and then the nodes of the
ring that was found are put into every order; what any other ring could gain is bounded by a relaxation in
which a node may be used more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.any_order import (
    MAX_STEPS,
    TIE,
    Placed,
    Ring,
    cheapest_in_any_order,
    cheapest_with_reuse,
    kinds_of,
    num_steps,
)
from planner.best_ring import Value, all_values, best_ring
from planner.cost import CostModel, Stage
from planner.one_order import cheapest_in_order
from planner.tables import Floats, StageTables

MAX_KEPT_ELEMENTS = 1 << 24  # of the tables of stages: 128 MiB


@dataclass(frozen=True, slots=True)
class BestRing:
    """The stages in ring order. gap: no ring is better by more than this part of the objective; 0: exact."""

    stages: list[Stage]
    gap: float = 0.0


class RingSearch:
    """All rings of one cost model. `forced` gives the nodes that own exactly that range, by index."""

    def __init__(
        self, cost: CostModel, legal_cuts: frozenset[int] | None, forced: Mapping[int, tuple[int, int]]
    ) -> None:
        self.cost, self.tables = cost, StageTables(cost, legal_cuts, forced)
        free = tuple(i for i, node in enumerate(cost.nodes) if node.use and i not in forced)
        places = [
            (i, a, b)
            for i, (start, stop) in sorted(forced.items(), key=lambda item: item[1])
            if (a := self.tables.at(start)) is not None and (b := self.tables.at(stop)) is not None
        ]
        self.is_possible = len(places) == len(forced)
        none = np.zeros((len(cost.nodes) + 1,) * 2)
        self.ring = Ring(self.tables.size, free, tuple(places), self.tables.overflow_bytes, none)

    # -- answers ------------------------------------------------------------------------------------------
    def fastest(self, objective: str) -> BestRing | None:
        """The best ring that fits, for `latency`, `throughput` or `ttft`; None where no ring was found."""
        cost = self.cost
        users = cost.work.concurrency
        if objective == "ttft":
            return self._best(self.tables.prefill_ms, self._hops(cost.work.prompt_tokens), None)
        if objective == "throughput":
            return self._best(self.tables.decode_ms, self._hops(1), lambda a, b: max(a / users, b))
        return self._best(self.tables.decode_ms, self._hops(1), None)

    def least_overflow(self) -> list[Stage] | None:
        """The stages that exceed their budgets by the least in all; None where the cuts allow no stages."""
        found = self._cheapest(self.ring, tie=0.0)
        return self._stages(found[1]) if found else None

    def widest(self, stage_cost: Callable[[int, int, int], float]) -> list[Stage] | None:
        """The cheapest of the rings that fit and have the most stages, in any order; None: no such ring."""

        def stage(i: int) -> Floats:
            return self.tables.filled(i, lambda a, b: stage_cost(i, a, b))

        ring = replace(self.ring, stage=stage)
        kinds = self._kinds(ring)
        found = None if kinds is None else cheapest_in_any_order(ring, kinds, is_wide=True)
        return self._stages(found[1]) if found else None

    # -- parts --------------------------------------------------------------------------------------------
    def _best(self, stage: Callable[[int], Floats], hop: Floats, value: Value | None) -> BestRing | None:
        if not self.is_possible:
            return None
        ring = replace(self.ring, stage=_Kept(stage, self.tables.size), hop=hop)
        kinds = self._kinds(ring)
        if kinds is not None:
            found = self._search(ring, value, lambda r: cheapest_in_any_order(r, kinds))
            return BestRing(self._stages(found[1])) if found else None
        found = self._search(ring, value, lambda r: cheapest_in_order(r, r.free))
        if found is None:
            return None
        used = {placed.index for placed in found[1]}
        mine = replace(ring, free=tuple(i for i in ring.free if i in used))
        few = self._kinds(mine)
        if few is not None:
            other = self._search(mine, value, lambda r: cheapest_in_any_order(r, few))
            found = other if other is not None and other[0] < found[0] * (1 - TIE) else found
        bound = cheapest_with_reuse(ring)
        if value is not None:
            bound = value(bound, 0.0)
        return BestRing(self._stages(found[1]), max(0.0, 1 - bound / found[0]))

    def _search(
        self,
        ring: Ring,
        value: Value | None,
        cheapest: Callable[[Ring], tuple[float, list[Placed]] | None],
    ) -> tuple[float, list[Placed]] | None:
        """(value, stages) of the best ring; without `value` the least sum."""
        if value is None:
            return cheapest(ring)
        nodes = [*ring.free, *(node for node, _, _ in ring.forced)]

        def least_sum(limit: float) -> tuple[float, list[Placed]] | None:
            def stage(i: int) -> Floats:
                own = ring.stage(i)
                return np.where(own <= limit, own, np.inf)

            return cheapest(replace(ring, stage=stage))

        def slowest(stages: Sequence[Placed]) -> float:
            return max(float(ring.stage(s.index)[s.start, s.stop]) for s in stages)

        limits = all_values({self._key(i): ring.stage(i) for i in nodes}.values())
        return best_ring(least_sum, slowest, value, limits)

    def _cheapest(self, ring: Ring, tie: float = TIE) -> tuple[float, list[Placed]] | None:
        if not self.is_possible:
            return None
        kinds = self._kinds(ring)
        if kinds is None:
            return cheapest_in_order(ring, ring.free, tie)
        return cheapest_in_any_order(ring, kinds, tie=tie)

    def _kinds(self, ring: Ring) -> list[list[int]] | None:
        """The free nodes by kind, where every order can be searched."""
        kinds = kinds_of(ring, self._key)
        return None if kinds is None or num_steps(ring, kinds) > MAX_STEPS else kinds

    def _key(self, i: int) -> tuple[object, ...]:
        """What a node's stages depend on."""
        node = self.cost.nodes[i]
        return node.budget_bytes, node.device, node.figures.bandwidth_gb_s, node.figures.tflops, node.layers

    def _hops(self, tokens: int) -> Floats:
        """(N + 1, N + 1) ms of every hop; the last row and column are the head's."""
        cost = self.cost
        ends = [*range(len(cost.nodes)), None]
        return np.array([[cost.hop_between_ms(a, b, tokens) for b in ends] for a in ends])

    def _stages(self, placed: Sequence[Placed]) -> list[Stage]:
        bounds = self.tables.bounds
        return [Stage(p.index, bounds[p.start], bounds[p.stop]) for p in placed]


class _Kept:
    """Tables by node, kept as long as there is room."""

    def __init__(self, make: Callable[[int], Floats], size: int) -> None:
        self._make, self._room = make, MAX_KEPT_ELEMENTS // size**2
        self._kept: dict[int, Floats] = {}

    def __call__(self, i: int) -> Floats:
        if i in self._kept:
            return self._kept[i]
        table = self._make(i)
        if len(self._kept) < self._room:
            self._kept[i] = table
        return table
