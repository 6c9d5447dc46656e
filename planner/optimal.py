"""The best ring for an objective: which nodes own layers, in which order, and where the cuts are. Pure.

Up to about twelve different nodes every subset and every order is searched, and the result is exact. Beyond
that the nodes stay in the order of the configuration, which is searched exactly, and then the nodes of the
ring that was found are put into every order; what any other ring could gain is bounded by a relaxation in
which a node may be used more than once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from planner.any_order import (
    MAX_STEPS,
    TIE,
    Placed,
    Ring,
    cheapest_in_any_order,
    kinds_of,
    num_steps,
)
from planner.best_ring import Value, all_values, best_ring
from planner.bounds import fluid_bounds, least_sum_with_reuse
from planner.cost import CostModel, Stage
from planner.hops import hop_tables
from planner.one_order import cheapest_in_order
from planner.pairs import pairs, parts
from planner.tables import Floats, StageTables

Cheapest = Callable[[Ring], tuple[float, list[Placed]] | None]
MIN_CALLS = 6  # of the search in one order, for a limit of the slowest stage
MAX_KEPT_ELEMENTS = 1 << 24  # of the tables of stages: 128 MiB


@dataclass(frozen=True, slots=True)
class BestRing:
    """The stages in ring order. gap: no ring is better by more than this part of the objective; 0: exact."""

    stages: list[Stage]
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Goal:
    """An objective: the sum over stages and hops, and what keeps a stage or a link busy at each beat."""

    stage: Callable[[int], Floats]  # (B, B) by node
    hop: Floats  # (N + 1, N + 1)
    busy_stage: Callable[[int], Floats]
    busy_hop: Floats
    value: Value | None  # of the sum and the longest beat; None: the sum
    layers: Callable[[int], Floats]  # (L,) time of each layer on a node, without what a stage adds


class RingSearch:
    """All rings of one cost model. `forced` gives the nodes that own exactly that range, by index.

    keeps_order: only rings in the order of the nodes. is_over_allowed: `fastest` takes the rings that exceed
    their budgets by the least in all, and of these the best.
    """

    def __init__(
        self,
        cost: CostModel,
        legal_cuts: frozenset[int] | None,
        forced: Mapping[int, tuple[int, int]],
        *,
        keeps_order: bool = False,
        is_over_allowed: bool = False,
    ) -> None:
        self.cost, self.keeps_order, self.is_over_allowed = cost, keeps_order, is_over_allowed
        self.tables = StageTables(cost, legal_cuts, forced, is_over_allowed=is_over_allowed)
        used = tuple(i for i, node in enumerate(cost.nodes) if node.use)
        places = [
            (i, a, b)
            for i, (start, stop) in sorted(forced.items(), key=lambda item: item[1])
            if (a := self.tables.at(start)) is not None and (b := self.tables.at(stop)) is not None
        ]
        self.is_possible = len(places) == len(forced)
        if keeps_order:  # a forced node takes its turn: its tables allow its own range alone, to it alone
            free, places = used, []
        else:
            free = tuple(i for i in used if i not in forced)
        none = np.zeros((len(cost.nodes) + 1,) * 2)
        self.ring = Ring(self.tables.size, free, tuple(places), self.tables.overflow_bytes, none)

    # -- answers ------------------------------------------------------------------------------------------
    def fastest(self, objective: str) -> BestRing | None:
        """The best ring that fits, for `latency`, `throughput` or `ttft`; None where no ring was found."""
        goal = self._first_token() if objective == "ttft" else self._decode(objective == "throughput")
        return self._best(goal) if self.is_possible else None

    def least_overflow(self) -> list[Stage] | None:
        """The stages that exceed their budgets by the least in all; None where the cuts allow no stages."""
        found = self._least_overflow()
        return self._stages(found[1]) if found else None

    def widest(self, stage_cost: Callable[[int, int, int], float]) -> list[Stage] | None:
        """The cheapest of the rings that fit and have the most stages, in any order; None: no such ring."""
        if self.keeps_order:
            return None

        def stage(i: int) -> Floats:
            return self.tables.filled(i, lambda a, b: stage_cost(i, a, b))

        ring = replace(self.ring, stage=stage)
        kinds = self._kinds(ring)
        found = None if kinds is None else cheapest_in_any_order(ring, kinds, is_wide=True)
        return self._stages(found[1]) if found else None

    # -- goals --------------------------------------------------------------------------------------------
    def _decode(self, has_users: bool) -> Goal:
        """has_users: of all users together, whose frames carry `rows` tokens each."""
        cost, tables, work = self.cost, self.tables, self.cost.work
        stage = _Kept(partial(tables.decode_ms, is_batched=has_users), tables.size)
        hop, busy = hop_tables(cost, work.rows if has_users else 1)
        users, rows = work.concurrency, min(work.rows, work.concurrency)
        value = (lambda path_ms, beat_ms: max(path_ms / users, beat_ms / rows)) if has_users else None
        layers = partial(self._layers_ms, partial(cost.decode_sums_ms, is_batched=has_users))
        return Goal(stage, hop, stage, busy if has_users else np.zeros_like(hop), value, layers)

    def _first_token(self) -> Goal:
        """The last stage makes the step of the prompt's last token besides."""
        cost, tables = self.cost, self.tables
        chunk = _Kept(tables.chunk_ms, tables.size)

        def stage(i: int) -> Floats:
            table = chunk(i).copy()
            table[:, -1] += tables.decode_ms(i)[:, -1]
            return table

        hop, busy = hop_tables(cost, cost.work.mean_chunk_tokens)
        more = cost.work.num_chunks - 1
        value = (lambda total_ms, slowest_ms: total_ms + more * slowest_ms) if more else None
        layers = partial(self._layers_ms, cost.chunk_sums_ms)
        return Goal(_Kept(stage, tables.size), hop, chunk, busy, value, layers)

    def _layers_ms(self, sums_of: Callable[[int], Floats], index: int) -> Floats:
        return np.diff(sums_of(index))[: self.cost.model.num_layers]

    # -- parts --------------------------------------------------------------------------------------------
    def _best(self, goal: Goal) -> BestRing | None:
        ring = replace(self.ring, stage=goal.stage, hop=goal.hop)
        if self.keeps_order:
            found = self._search(ring, goal, partial(cheapest_in_order, order=ring.free))
            return BestRing(self._stages(found[1])) if found else None
        kinds = self._kinds(ring, goal.busy_hop)
        if kinds is not None:
            found = self._search(ring, goal, lambda r: cheapest_in_any_order(r, kinds))
            return BestRing(self._stages(found[1])) if found else None
        for order in self._orders():
            found = self._search(ring, goal, partial(cheapest_in_order, order=order), is_bounded=True)
            if found is not None:
                break
        else:
            return None
        used = {placed.index for placed in found[1]}
        mine = replace(ring, free=tuple(i for i in ring.free if i in used))
        few = self._kinds(mine, goal.busy_hop)
        if few is not None:
            other = self._search(mine, goal, lambda r: cheapest_in_any_order(r, few))
            found = other if other is not None and other[0] < found[0] * (1 - TIE) else found
        gap = 1.0 if self.is_over_allowed else 1 - self._bound(ring, goal) / found[0]
        return BestRing(self._stages(found[1]), max(0.0, gap))

    def _bound(self, ring: Ring, goal: Goal) -> float:
        """A value that no ring is below."""
        nodes = [*ring.free, *(node for node, _, _ in ring.forced)]
        layers_ms = np.stack([goal.layers(i) for i in nodes])
        fluid_ms, beat_ms = fluid_bounds(self.cost, nodes, ring.hop, layers_ms)
        least_ms = max(least_sum_with_reuse(ring), fluid_ms)
        return least_ms if goal.value is None else goal.value(least_ms, beat_ms)

    def _search(
        self, ring: Ring, goal: Goal, cheapest: Cheapest, *, is_bounded: bool = False
    ) -> tuple[float, list[Placed]] | None:
        """(value, stages) of the best ring. is_bounded: stop early where that would take too long."""
        if self.is_over_allowed:
            cheapest = self._of_least_overflow(cheapest)
        if goal.value is None:
            return cheapest(ring)
        nodes = [*ring.free, *(node for node, _, _ in ring.forced)]

        def least_sum(limit: float) -> tuple[float, list[Placed]] | None:
            def stage(i: int) -> Floats:
                return np.where(goal.busy_stage(i) <= limit, ring.stage(i), np.inf)

            return cheapest(
                replace(ring, stage=stage, hop=np.where(goal.busy_hop <= limit, ring.hop, np.inf))
            )

        def slowest(stages: Sequence[Placed]) -> float:
            ends = [ring.head, *(s.index for s in stages), ring.head]
            hops = [float(goal.busy_hop[a, b]) for a, b in itertools.pairwise(ends)]
            return max(*hops, *(float(goal.busy_stage(s.index)[s.start, s.stop]) for s in stages))

        beats = {self._key(i): goal.busy_stage(i) for i in nodes}
        num_steps = len(nodes) * ring.size * (ring.size + len(nodes))
        return best_ring(
            least_sum,
            slowest,
            goal.value,
            all_values([goal.busy_hop, *beats.values()]),
            max_calls=max(MIN_CALLS, MAX_STEPS // num_steps) if is_bounded else None,
        )

    def _of_least_overflow(self, cheapest: Cheapest) -> Cheapest:
        """The search among the rings that exceed their budgets by the least."""
        least = self._least_overflow()
        least_bytes = least[0] if least else np.inf

        def search(ring: Ring) -> tuple[float, list[Placed]] | None:
            def stage(i: int) -> Floats:
                return pairs(self.tables.overflow_bytes(i), ring.stage(i))

            found = cheapest(replace(ring, stage=stage, hop=pairs(np.zeros_like(ring.hop), ring.hop)))
            if found is None or parts(found[0])[0] > least_bytes:
                return None
            return parts(found[0])[1], found[1]

        return search

    def _orders(self) -> list[list[int]]:
        """Orders of the free nodes: the configuration's, and for what does not fit in it by size."""
        free, nodes = list(self.ring.free), self.cost.nodes
        if self.keeps_order:
            return [free]
        by_size = sorted(free, key=lambda i: nodes[i].budget_bytes)
        return [free, by_size[::-1], by_size]

    def _least_overflow(self) -> tuple[float, list[Placed]] | None:
        if not self.is_possible:
            return None
        kinds = None if self.keeps_order else self._kinds(self.ring)
        if kinds is not None:
            return cheapest_in_any_order(self.ring, kinds, tie=0.0)
        found = [cheapest_in_order(self.ring, order, tie=0.0) for order in self._orders()]
        return min((f for f in found if f is not None), key=lambda f: f[0], default=None)

    def _kinds(self, ring: Ring, *hops: Floats) -> list[list[int]] | None:
        """The free nodes by kind, where every order can be searched. hops: besides the ring's own."""
        kinds = kinds_of(ring.free, [ring.hop, *hops], self._key)
        return None if kinds is None or num_steps(ring, kinds) > MAX_STEPS else kinds

    def _key(self, i: int) -> tuple[object, ...]:
        """What a node's stages depend on."""
        node = self.cost.nodes[i]
        return node.budget_bytes, node.device, node.speeds, node.layers

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
