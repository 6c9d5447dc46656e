"""What no ring can be below, for clusters too large to search every order of. Pure.

Two relaxations, of which the larger counts. Reuse: a node may have several stages, each within its budget.
Fluid: layers may be poured in any amounts over nodes until their budgets are full, the fastest first, each
byte at the price of the cheapest layer's; stages and hops then cost their least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.any_order import Ring
from planner.cost import CostModel
from planner.tables import Floats

MAX_REUSE_ELEMENTS = 1 << 24  # of all nodes' stages


def least_sum_with_reuse(ring: Ring) -> float:
    """The least sum of stages and hops where a node may have several stages."""
    nodes = [*ring.free, *(node for node, _, _ in ring.forced)]
    if len(nodes) * ring.size**2 > MAX_REUSE_ELEMENTS:
        return 0.0
    rows = np.array([*nodes, ring.head])
    hop = ring.hop[np.ix_(rows, rows)]
    stages = np.stack([ring.stage(node) for node in nodes])  # (N, B, B)
    value = np.full((len(rows), ring.size), np.inf)  # (N + 1, B)
    value[-1, 0] = 0.0
    for at in range(ring.size - 1):
        arrive = (value[:, at, None] + hop).min(axis=0)
        np.minimum(value[:-1], arrive[:-1, None] + stages[:, at], out=value[:-1])
    return float((value[:, -1] + hop[:, -1]).min())


def fluid_bounds(
    cost: CostModel, nodes: Sequence[int], hop: Floats, layers_ms: Floats
) -> tuple[float, float]:
    """(sum, slowest stage), ms. layers_ms: (N, L) time of each layer on each of the nodes.

    A layer's work is its time where that is least; a node's rate is the most work that it does in a ms, of
    any layer. inf where the budgets of all nodes together are too small.
    """
    layer_work = layers_ms.min(axis=0)  # (L,)
    rates = (layer_work / layers_ms).max(axis=1)  # (N,)
    num_layers = cost.model.num_layers
    need_bytes = np.array([cost.layer_bytes(i) for i in range(num_layers)], dtype=np.float64)
    budgets = np.array([cost.nodes[i].budget_bytes for i in nodes], dtype=np.float64)
    total_bytes = need_bytes.sum()
    if budgets.sum() < total_bytes:
        return np.inf, np.inf
    holds = need_bytes > 0
    density = (layer_work[holds] / need_bytes[holds]).min(initial=np.inf) if holds.all() else 0.0
    order = np.argsort(-rates)
    poured = np.diff(np.minimum(np.cumsum(budgets[order]), total_bytes), prepend=0.0)
    work_ms = float((poured * density / rates[order]).sum())
    num_stages = 1 + int(np.searchsorted(np.cumsum(np.sort(budgets)[::-1]), total_bytes))
    inner = hop[np.ix_(nodes, nodes)] + np.where(np.eye(len(nodes)), np.inf, 0.0)
    hops_ms = (num_stages - 1) * float(inner.min()) if num_stages > 1 else 0.0
    stage_ms = min(cost.nodes[i].speeds.stage_ms for i in nodes)
    least_ms = work_ms + num_stages * stage_ms + hops_ms
    return least_ms, float(layer_work.sum() / rates.sum())
