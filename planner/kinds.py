"""What the search of every order takes, and the least sums of other tables than its own. Pure."""

from __future__ import annotations

from collections.abc import Callable

from planner.any_order import MAX_STEPS, Ring, cheapest_in_any_order, kinds_of, num_steps
from planner.cost import CostModel, Stage
from planner.hops import hop_tables
from planner.optimal import RingSearch
from planner.tables import Floats

MAX_CALLS = 15  # of the search, for an objective that is no plain sum
Key = Callable[[int], object]


def node_key(cost: CostModel) -> Key:
    """What the stages of a node depend on."""

    def key(i: int) -> object:
        node = cost.nodes[i]
        return node.budget_bytes, node.device, node.speeds, node.layers

    return key


def steps_of(search: RingSearch, objective: str) -> int | None:
    """About how many additions the best ring takes; None: not every order can be searched."""
    tokens = search.cost.work.mean_chunk_tokens if objective == "ttft" else 1
    kinds = kinds_of(search.ring.free, hop_tables(search.cost, tokens), node_key(search.cost))
    if kinds is None:
        return None
    steps = num_steps(search.ring, kinds)
    return None if steps > MAX_STEPS else steps * (1 if objective == "latency" else MAX_CALLS)


def is_exhaustive(search: RingSearch) -> bool:
    """Whether what fits is searched in every order of the nodes."""
    return _kinds(search.ring, node_key(search.cost)) is not None


def cheapest(
    search: RingSearch, stage: Callable[[int], Floats], key: Key | None = None
) -> tuple[float, list[Stage]] | None:
    """The least sum of `stage`, (B, B) by node, over all rings, and its stages.

    key: equal for nodes with equal tables. None where there is no such ring, or not every order can be
    searched.
    """
    ring = Ring(search.ring.size, search.ring.free, search.ring.forced, stage, search.ring.hop)
    kinds = _kinds(ring, key or node_key(search.cost))
    if kinds is None or not search.is_possible:
        return None
    found = cheapest_in_any_order(ring, kinds, tie=0.0)
    if found is None:
        return None
    bounds = search.tables.bounds
    return found[0], [Stage(p.index, bounds[p.start], bounds[p.stop]) for p in found[1]]


def _kinds(ring: Ring, key: Key) -> list[list[int]] | None:
    kinds = kinds_of(ring.free, [ring.hop], key)
    return None if kinds is None or num_steps(ring, kinds) > MAX_STEPS else kinds
