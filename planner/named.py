"""The strategies besides `optimal`: what each wants every stage to be like, as costs for the searches. Pure.

All of them use as many nodes as can hold a layer; of the splits that do, each takes the one closest to its
ideal, as far as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.any_order import Placed
from planner.best_ring import all_values
from planner.cost import CostModel, Stage
from planner.optimal import RingSearch
from planner.tables import Floats

PROPORTIONAL = ("memory_proportional", "compute_proportional", "uniform")


def balanced(rings: RingSearch) -> list[Stage] | None:
    """Least time of the slowest stage over all nodes; among those the most even ones. None: nothing fits.

    Where only another order of the nodes fits, the most even stages.
    """
    tables = {i: rings.tables.decode_ms(i) for i in rings.nodes}

    def below(limit_ms: float) -> list[Placed] | None:
        """The most even stages of at most that time each."""
        return rings.widest_in_order(lambda i: np.where(tables[i] <= limit_ms, tables[i], np.inf) ** 2)

    best = below(np.inf)
    if best is None:
        found = rings.widest_in_any_order(lambda i: tables[i] ** 2)
        return rings.stages(found) if found else None
    limits = all_values(tables.values())
    low, high = 0, int(np.searchsorted(limits, slowest(tables, best)))
    while low < high:
        middle = (low + high) // 2
        found = below(float(limits[middle]))
        if found is None or len(found) < len(best):
            low = middle + 1
        else:
            best, high = found, int(np.searchsorted(limits, slowest(tables, found)))
    return rings.stages(best)


def slowest(tables: dict[int, Floats], stages: list[Placed]) -> float:
    """The longest time of the stages."""
    return max(float(tables[s.index][s.start, s.stop]) for s in stages)


def proportional(rings: RingSearch, strategy: str) -> list[Stage] | None:
    """Least sum of squared distances between each node's part and its ideal share. None: nothing fits."""
    cost = rings.cost
    shares, part = _ideal_shares(cost, strategy), rings.tables.filled(_part(cost, strategy))

    def distance(i: int) -> Floats:
        return np.where(rings.tables.fits(i), (part - shares[i]) ** 2, np.inf)

    found = rings.widest_in_order(distance) or rings.widest_in_any_order(distance)
    return rings.stages(found) if found else None


def _ideal_shares(cost: CostModel, strategy: str) -> list[float]:
    """Each node's part of the model, from 0 to 1."""
    match strategy:
        case "memory_proportional":
            sizes = [float(node.budget_bytes) for node in cost.nodes]
        case "compute_proportional":
            sizes = [node.speeds.flops_ms for node in cost.nodes]
        case _:
            sizes = [1.0 for _ in cost.nodes]
    amounts = [size if node.use else 0.0 for size, node in zip(sizes, cost.nodes, strict=True)]
    total = sum(amounts) or 1.0
    return [amount / total for amount in amounts]


def _part(cost: CostModel, strategy: str) -> Callable[[int, int], float]:
    """A stage's part of the model: of its bytes, of its multiplications, or of its layers."""
    num_layers = cost.model.num_layers

    def kept_bytes(start: int, stop: int) -> int:
        return cost.weight_bytes(start, stop) + cost.kv_bytes(start, stop)

    def layers(start: int, stop: int) -> int:
        return stop - start

    match strategy:
        case "memory_proportional":
            amount = kept_bytes
        case "compute_proportional":
            amount = cost.active_params
        case _:
            amount = layers
    whole = amount(0, num_layers)
    return lambda start, stop: amount(start, stop) / whole
