"""What the search of every order takes, and the least sums of other tables than its own. Pure."""

from __future__ import annotations

from collections.abc import Callable

from planner.any_order import MAX_STEPS, Ring, cheapest_in_any_order, kinds_of, num_steps
from planner.cost import CostModel, Stage
from planner.hops import hop_tables
from planner.one_order import cheapest_in_order
from planner.optimal import RingSearch
from planner.tables import Floats

MAX_CALLS = 10  # of the search, for an objective that is no plain sum
Key = Callable[[int], object]


def steps_of(search: RingSearch, objective: str) -> int | None:
    """About how many additions the best ring takes; None: not every order can be searched."""
    size, calls = search.ring.size, 1 if objective == "latency" else MAX_CALLS
    if search.keeps_order:
        return calls * len(search.ring.free) * size * (size + len(search.ring.free))
    kinds = kinds_for(search, objective)
    steps = None if kinds is None else num_steps(search.ring, kinds)
    return None if steps is None or steps > MAX_STEPS else calls * steps


def kinds_for(search: RingSearch, objective: str) -> list[list[int]] | None:
    """The nodes that are free to own layers, by kind; None: too many kinds."""
    hops = hop_tables(search.cost, frame_tokens(search.cost, objective))
    return kinds_of(search.ring.free, hops, search.cost.node_key)


def frame_tokens(cost: CostModel, objective: str) -> int:
    """Tokens of the frames that count for an objective."""
    match objective:
        case "throughput":
            return cost.work.rows
        case "ttft":
            return cost.work.mean_chunk_tokens
        case _:
            return 1


def cheapest(
    search: RingSearch, stage: Callable[[int], Floats], key: Key | None = None
) -> tuple[float, list[Stage]] | None:
    """The least sum of `stage`, (B, B) by node, over all rings, and its stages; None: there is no such ring.

    key: equal for nodes with equal tables. Where not every order can be searched: in the order of the nodes.
    """
    if not search.is_possible:
        return None
    ring = Ring(search.ring.size, search.ring.free, search.ring.forced, stage, search.ring.hop)
    kinds = None if search.keeps_order else _kinds(ring, key or search.cost.node_key)
    if kinds is None:
        found = cheapest_in_order(ring, ring.free, tie=0.0)
    else:
        found = cheapest_in_any_order(ring, kinds, tie=0.0)
    return None if found is None else (found[0], search.stages(found[1]))


def _kinds(ring: Ring, key: Key) -> list[list[int]] | None:
    kinds = kinds_of(ring.free, [ring.hop], key)
    return None if kinds is None or num_steps(ring, kinds) > MAX_STEPS else kinds
