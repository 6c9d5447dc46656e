"""The best ring for an objective: which nodes own layers, in which order, and where the cuts are. Pure.

Up to about twelve different nodes every subset and every order is searched, and the result is exact. Beyond
that the nodes stay in the order of the configuration, or in one that fits, which is searched exactly; then
the order is made better node by node, and a relaxation says what any other ring could gain at most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

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
from planner.best_ring import all_values, best_ring
from planner.bounds import fluid_bounds, fluid_prices
from planner.cost import CostModel, Stage
from planner.even import evened
from planner.feasible import Feasibility, find_order, reach_of
from planner.goals import Goal, goal_of
from planner.one_order import cheapest_in_order
from planner.pairs import pairs, parts
from planner.relaxed import least_value, relax
from planner.reorder import reorder
from planner.tables import Floats, StageTables

Cheapest = Callable[[Ring], tuple[float, list[Placed]] | None]
MAX_REORDERED = 64  # nodes, or those of the ring that was found
MAX_MOVES = 60  # of single nodes in an order
MIN_CALLS = 6  # of the search in one order, for a limit of the slowest stage


@dataclass(frozen=True, slots=True)
class BestRing:
    """The stages in ring order. gap: no ring is better by more than this part of the objective; 0: exact."""

    stages: list[Stage]
    gap: float = 0.0


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
    def fastest(self, objective: str, *, is_even: bool = False) -> BestRing | None:
        """The best ring that fits, for `latency`, `throughput` or `ttft`; None where no ring was found.

        is_even: of equally good ones an even one, where all orders are searched.
        """
        if not self.is_possible:
            return None
        return self._best(goal_of(self.tables, objective), is_even=is_even and objective != "ttft")

    def least_overflow(self) -> list[Stage] | None:
        """The stages that exceed their budgets by the least in all; None where the cuts allow no stages."""
        found = self._least_overflow
        return self.stages(found[1]) if found else None

    def widest_in_order(self, stage: Callable[[int], Floats]) -> list[Placed] | None:
        """The cheapest of the rings with the most stages, in the order of the nodes; None: no such ring.

        stage: (B, B) by node, inf where it does not fit.
        """

        def wide(i: int) -> Floats:
            table = stage(i)
            return pairs(np.full_like(table, -1.0), table)

        ring = replace(self.ring, stage=wide, hop=pairs(self.ring.hop, self.ring.hop))
        found = cheapest_in_order(ring, ring.free) if self.is_possible else None
        return found[1] if found else None

    def widest_in_any_order(self, stage: Callable[[int], Floats]) -> list[Placed] | None:
        """The same in any order, or in one that fits where there are too many."""
        if self.keeps_order or not self.is_possible:
            return None
        kinds, ring = self._kinds(self.ring), replace(self.ring, stage=stage)
        if kinds is not None:
            found = cheapest_in_any_order(ring, kinds, is_wide=True)
        else:
            tried = (cheapest_in_order(ring, order) for order in self._orders_to_try())
            found = next((ring for ring in tried if ring is not None), None)
        return found[1] if found else None

    @cached_property
    def feasibility(self) -> Feasibility:
        """Whether any order fits at all, for more nodes than can be searched in every order."""
        places = [(start, stop) for _, start, stop in self.ring.forced]
        if not all(self.tables.fits(node)[start, stop] for node, start, stop in self.ring.forced):
            return Feasibility(None, is_proven=True)
        reach = {i: reach_of(self.tables.fits(i)) for i in self.ring.free}
        known = {i: own for i, own in reach.items() if own is not None}
        layers_bytes = [self.cost.layer_bytes(i) for i in range(self.cost.model.num_layers)]
        sums = np.concatenate([[0], np.cumsum(layers_bytes)])[list(self.tables.bounds)]
        found = find_order(known, places, np.array([self.tables.bounds, sums], dtype=np.float64))
        return found if found.order or len(known) == len(reach) else Feasibility(None, is_proven=False)

    @property
    def knows_least_overflow(self) -> bool:
        """False where another order may exceed the budgets by less than `least_overflow`."""
        return self.keeps_order or self._kinds(self.ring) is not None

    @property
    def proves_refusals(self) -> bool:
        """False where a ring may fit although none was found."""
        return self.knows_least_overflow or self.feasibility.is_proven

    def num_steps(self, *, is_any_order: bool) -> int:
        """About how many additions a search makes: of all orders, or as many as are tried; or of one."""
        kinds = self._kinds(self.ring) if is_any_order and not self.keeps_order else None
        if kinds is not None:
            return num_steps(self.ring, kinds)
        in_order = len(self.nodes) * self.tables.size * (self.tables.size + len(self.nodes))
        return in_order * (MAX_MOVES if is_any_order and not self.keeps_order else 1)

    @property
    def nodes(self) -> list[int]:
        """The nodes that may own layers."""
        return [*self.ring.free, *(node for node, _, _ in self.ring.forced)]

    def stages(self, placed: Sequence[Placed]) -> list[Stage]:
        """The layers that boundaries stand for."""
        bounds = self.tables.bounds
        return [Stage(p.index, bounds[p.start], bounds[p.stop]) for p in placed]

    # -- parts --------------------------------------------------------------------------------------------
    def _best(self, goal: Goal, *, is_even: bool) -> BestRing | None:
        ring = replace(self.ring, stage=goal.stage, hop=goal.hop)
        kinds = None if self.keeps_order else self._kinds(ring, goal.busy_hop)
        exact: Cheapest | None = None
        if self.keeps_order:
            exact = partial(cheapest_in_order, order=ring.free)
        elif kinds is not None:
            exact = partial(cheapest_in_any_order, kinds=kinds)
        if exact is not None:
            found = self._search(ring, goal, exact)
            if found is not None and is_even and not self.is_over_allowed:
                found = evened(found, goal, ring, exact)
            return BestRing(self.stages(found[1])) if found else None
        for order in self._orders_to_try():
            found = self._search(ring, goal, partial(cheapest_in_order, order=order), is_bounded=True)
            if found is not None:
                break
        else:
            return None
        found = self._reordered(ring, goal, *found)
        gap = 1.0 if self.is_over_allowed else 1 - self._bound(ring, goal, *found) / found[0]
        return BestRing(self.stages(found[1]), max(0.0, gap))

    def _reordered(
        self, ring: Ring, goal: Goal, value: float, placed: list[Placed]
    ) -> tuple[float, list[Placed]]:
        """The ring that was found, or a better one of its nodes in another order, with a few others."""
        used = [p.index for p in placed]
        mine = replace(ring, free=tuple(i for i in ring.free if i in used))
        kinds = self._kinds(mine, goal.busy_hop)
        if kinds is not None:
            other = self._search(mine, goal, lambda r: cheapest_in_any_order(r, kinds))
        elif not ring.forced and not self.is_over_allowed:
            prices = fluid_prices(self.cost, ring.free, np.stack([goal.layers(i) for i in ring.free]))
            spare = [ring.free[at] for at in np.argsort(-prices, kind="stable").tolist()]
            few = [*used, *(i for i in spare if i not in used)][: max(MAX_REORDERED, len(used))]
            order = reorder(goal.below(ring, goal.beat_ms(placed)) if goal.value else ring, few)
            other = self._search(
                replace(ring, free=tuple(few)), goal, partial(cheapest_in_order, order=order), is_bounded=True
            )
        else:
            other = None
        return other if other is not None and other[0] < value * (1 - TIE) else (value, placed)

    def _bound(self, ring: Ring, goal: Goal, value: float, placed: list[Placed]) -> float:
        """A value that no ring is below."""
        layers_ms = np.stack([goal.layers(i) for i in self.nodes])
        least = fluid_bounds(self.cost, self.nodes, ring.hop, layers_ms)
        relaxation = relax(ring, goal)
        if relaxation is None:
            return least[0] if goal.value is None else goal.value(*least)
        at = {node: number for number, node in enumerate(self.nodes)}
        rows = layers_ms[[at[node] for node in relaxation.nodes]]
        relaxation.prices = fluid_prices(self.cost, relaxation.nodes, rows)
        return least_value(relaxation, goal, (ring.total(placed), goal.beat_ms(placed)), least)

    def _search(
        self, ring: Ring, goal: Goal, cheapest: Cheapest, *, is_bounded: bool = False
    ) -> tuple[float, list[Placed]] | None:
        """(value, stages) of the best ring. is_bounded: stop early where that would take too long."""
        if self.is_over_allowed:
            cheapest = self._of_least_overflow(cheapest)
        if goal.value is None:
            return cheapest(ring)
        beats = {self.cost.node_key(i): goal.busy_stage(i) for i in self.nodes}
        num_steps = self.num_steps(is_any_order=False)
        return best_ring(
            lambda limit_ms: cheapest(goal.below(ring, limit_ms)),
            goal.beat_ms,
            goal.value,
            all_values([goal.busy_hop, *beats.values()]),
            max_calls=max(MIN_CALLS, MAX_STEPS // num_steps) if is_bounded else None,
        )

    def _of_least_overflow(self, cheapest: Cheapest) -> Cheapest:
        """The search among the rings that exceed their budgets by the least."""
        least = self._least_overflow
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

    def _orders_to_try(self) -> Iterator[list[int]]:
        """Those, and at last one that fits, if any was found, with the other nodes behind it.

        Where budgets may be exceeded, the one that exceeds them least.
        """
        order: tuple[int, ...] | None
        if self.is_over_allowed:
            placed = self._least_overflow[1] if self._least_overflow else []
            order = tuple(p.index for p in placed if p.index in self.ring.free)
        else:
            yield from self._orders()
            order = self.feasibility.order
        if order is not None:
            yield [*order, *(i for i in self.ring.free if i not in order)]

    @cached_property
    def _least_overflow(self) -> tuple[float, list[Placed]] | None:
        if not self.is_possible:
            return None
        kinds = None if self.keeps_order else self._kinds(self.ring)
        if kinds is not None:
            return cheapest_in_any_order(self.ring, kinds, tie=0.0)
        found = [
            (*ring, order)
            for order in self._orders()
            if (ring := cheapest_in_order(self.ring, order, tie=0.0))
        ]
        if not found:
            return None
        best = min(found, key=lambda f: f[0])
        if not self.keeps_order:
            best = self._fewer_over(*best)
        return best[0], best[1]

    def _fewer_over(
        self, over_bytes: float, placed: list[Placed], order: list[int]
    ) -> tuple[float, list[Placed], list[int]]:
        """A smaller overflow, if moving single nodes in the order gives one; always tried alike."""
        rng = random.Random(0)
        best = (over_bytes, placed, order)
        for _ in range(min(MAX_MOVES, MAX_STEPS // 4 // self.num_steps(is_any_order=False))):
            moved = list(best[2])
            moved.insert(rng.randrange(len(moved)), moved.pop(rng.randrange(len(moved))))
            ring = cheapest_in_order(self.ring, moved, tie=0.0)
            if ring is not None and ring[0] < best[0]:
                best = (*ring, moved)
        return best

    def _kinds(self, ring: Ring, *hops: Floats) -> list[list[int]] | None:
        """The free nodes by kind, where every order can be searched. hops: besides the ring's own."""
        kinds = kinds_of(ring.free, [ring.hop, *hops], self.cost.node_key)
        return None if kinds is None or num_steps(ring, kinds) > MAX_STEPS else kinds
