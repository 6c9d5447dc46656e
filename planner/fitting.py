"""What would fit instead of what does not: other workloads, higher limits, more nodes. Pure.

Every answer is found over all splits by the planner's own search. Where there are too many different nodes
to search every order, only the split at hand or the order of the nodes is asked, so that an answer still fits
but need not be the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from planner.cost import CostModel, Stage
from planner.forced import check_forced
from planner.kinds import cheapest
from planner.node_profile import NodeProfile
from planner.optimal import RingSearch
from planner.tables import Floats
from planner.workload import Workload

MIB = 1 << 20
MAX_MORE_NODES = 64  # nobody adds more to a cluster on which nothing fits


def largest(low: int, high: int, is_fine: Callable[[int], bool]) -> int:
    """The largest number in [low, high) that is fine; `low` is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_fine(middle) else (low, middle)
    return low


def fits(cost: CostModel, legal_cuts: frozenset[int] | None, *, keeps_order: bool = False) -> bool:
    """Whether the planner has a plan for it."""
    forced = check_forced(cost.nodes, cost.model.num_layers)
    search = RingSearch(cost, legal_cuts, forced, keeps_order=keeps_order)
    stages = search.least_overflow()
    if stages is not None and do_fit(cost, stages):
        return True
    return not search.knows_least_overflow and search.feasibility.order is not None


def do_fit(cost: CostModel, stages: Sequence[Stage]) -> bool:
    """Whether each stage is within its node's budget."""
    return not any(cost.overflow_bytes(s.index, s.start, s.stop) for s in stages)


@dataclass(frozen=True, slots=True)
class Fitting:
    """The questions about a cluster on which nothing fits. `stages`: the split that exceeds it least."""

    cost: CostModel
    legal_cuts: frozenset[int] | None
    stages: Sequence[Stage] | None
    keeps_order: bool = False
    forced: Mapping[int, tuple[int, int]] = field(init=False)
    search: RingSearch = field(init=False)

    def __post_init__(self) -> None:
        forced = check_forced(self.cost.nodes, self.cost.model.num_layers)
        object.__setattr__(self, "forced", forced)
        object.__setattr__(self, "search", self._search(self.cost))

    # -- less work ----------------------------------------------------------------------------------------
    def largest_context(self) -> int:
        """Tokens, below the asked number; 0: none fits."""
        work = self.cost.work
        return self._most(work.context, lambda n: replace(work, context=n))

    def largest_concurrency(self) -> int:
        """Requests at once, below the asked number; 0: not even one fits."""
        work = self.cost.work
        return self._most(work.concurrency, lambda n: replace(work, concurrency=n))

    def _most(self, high: int, work_of: Callable[[int], Workload]) -> int:
        """The largest n in [1, high) for which a split fits, where all below a fine one are; 0: none.

        A split that was found is asked for more before the next one is searched.
        """

        def cost_of(n: int) -> CostModel:
            return CostModel(self.cost.model, self.cost.nodes, (), work_of(n))

        def held_by(stages: Sequence[Stage]) -> Callable[[int], bool]:
            return lambda n: do_fit(cost_of(n), stages)

        def is_hopeless(n: int) -> bool:
            cost = cost_of(n)
            return cost.weight_bytes(0, num_layers) + cost.kv_bytes(0, num_layers) > budget_bytes

        num_layers = self.cost.model.num_layers
        budget_bytes = sum(node.budget_bytes for node in self.cost.nodes if node.use)
        high = 1 + largest(0, high, lambda n: not is_hopeless(n))
        low, known = 0, self.stages
        while high - low > 1:
            if known is not None and held_by(known)(low + 1):
                low = largest(low + 1, high, held_by(known))
            elif not self.search.knows_least_overflow:
                break
            else:
                middle = (low + high) // 2
                known = self.split(cost_of(middle))
                low, high = (low, middle) if known is None else (middle, high)
        return low

    def split(self, cost: CostModel) -> list[Stage] | None:
        """Stages that fit another cost model of nodes with the same forced layers; None where none do."""
        stages = self._search(cost).least_overflow()
        return stages if stages is not None and do_fit(cost, stages) else None

    # -- more memory --------------------------------------------------------------------------------------
    def raised_limits_mib(self) -> dict[int, int]:
        """GPU limits of Macs, by index, with which a split fits and the reserve is left; empty: none do.

        Of all such splits the one that raises the limits by the least in all.
        """
        least = self._least_limits([self._raised(i) for i in range(len(self.cost.nodes))])
        return {i: -(-nbytes // MIB) for i, nbytes in least.items()}

    def raised_caps_bytes(self) -> dict[int, int]:
        """The user's own limits, by index, with which a split fits, likewise."""
        return self._least_limits([replace(node, cap_bytes=None) for node in self.cost.nodes])

    def _least_limits(self, high: Sequence[NodeProfile]) -> dict[int, int]:
        """What nodes need, reserve included, where they exceed their budgets by the least within `high`."""
        search = self._search(CostModel(self.cost.model, high, (), self.cost.work))
        key = self.cost.node_key

        def raise_bytes(i: int) -> Floats:
            return np.where(search.tables.fits(i), self.search.tables.overflow_bytes(i), np.inf)

        found = cheapest(search, raise_bytes, lambda i: (high[i].budget_bytes, key(i)))
        return {
            s.index: self.cost.need_bytes(s.index, s.start, s.stop) + self.cost.nodes[s.index].reserve_bytes
            for s in (found[1] if found is not None else ())
            if self.cost.overflow_bytes(s.index, s.start, s.stop)
        }

    def _raised(self, index: int) -> NodeProfile:
        """The node with its GPU limit as high as its reserve lets it be, where it is a Mac."""
        node = self.cost.nodes[index]
        most_bytes = (node.memory_bytes - node.reserve_bytes) // MIB * MIB
        is_mac = node.device == "metal" and node.chip is not None
        is_alone = sum(other.use and other.host == node.host for other in self.cost.nodes) == 1
        if not (node.use and is_mac and is_alone and most_bytes > node.ceiling_bytes):
            return node
        return replace(node, ceiling_bytes=most_bytes)

    # -- more nodes ---------------------------------------------------------------------------------------
    def new_node_budget_bytes(self) -> int | None:
        """The least budget of one node more with which a split fits; None: one is not enough."""
        new = len(self.cost.nodes)
        empty = replace(self._more(1)[-1], ceiling_bytes=0, cap_bytes=None, reserve_bytes=0)
        cost = CostModel(self.cost.model, [*self.cost.nodes, empty], (), self.cost.work)
        search = self._search(cost)

        def budget_bytes(i: int) -> Floats:
            if i == new:
                return search.tables.overflow_bytes(i)
            return np.where(search.tables.fits(i), 0.0, np.inf)

        found = cheapest(search, budget_bytes, cost.node_key)
        return None if found is None or not found[0] else int(found[0])

    def num_more_nodes(self) -> int | None:
        """How many nodes more like `best_node` let a split fit; None: too many."""
        cost, num_layers = self.cost, self.cost.model.num_layers
        missing_bytes = cost.weight_bytes(0, num_layers) + cost.kv_bytes(0, num_layers)
        missing_bytes -= sum(node.budget_bytes for node in cost.nodes if node.use)
        least = max(1, -(-missing_bytes // max(1, self.best_node.budget_bytes)))
        if not self.search.knows_least_overflow:
            return None
        tried = range(least, min(MAX_MORE_NODES, 2 * least + 4) + 1)
        return next((n for n in tried if self.fits_with([*cost.nodes, *self._more(n)])), None)

    def fits_with(self, nodes: Sequence[NodeProfile], *, keeps_order: bool | None = None) -> bool:
        """Whether a split fits other nodes, with their own forced layers; keeps_order None: as here."""
        cost = CostModel(self.cost.model, nodes, (), self.cost.work)
        return fits(
            cost, self.legal_cuts, keeps_order=self.keeps_order if keeps_order is None else keeps_order
        )

    def _search(self, cost: CostModel) -> RingSearch:
        return RingSearch(cost, self.legal_cuts, self.forced, keeps_order=self.keeps_order)

    @property
    def best_node(self) -> NodeProfile:
        """The node in use with the largest budget, then the fastest."""
        used = [node for node in self.cost.nodes if node.use]
        return max(used, key=lambda node: (node.budget_bytes, node.speeds.read_bytes_ms))

    def _more(self, num: int) -> list[NodeProfile]:
        """So many nodes more like the best."""
        rank = 1 + max(node.rank for node in self.cost.nodes)
        like = replace(self.best_node, layers=None)
        return [
            replace(like, rank=rank + n, name=f"new{n}", host=f"new{n}", num_sharing=1) for n in range(num)
        ]
