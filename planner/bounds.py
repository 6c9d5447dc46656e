"""What no ring can be below if layers could be poured like a fluid. Pure.

They may be poured in any amounts over nodes until their budgets are full, the fastest first, each byte at the
price of the cheapest layer's; stages and hops then cost their least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.cost import CostModel
from planner.tables import Floats

FILLED = 0.93  # of a budget, before the next layer does not fit


def fluid_prices(cost: CostModel, nodes: Sequence[int], layers_ms: Floats) -> Floats:
    """(N,) ms that the memory of each of the nodes saves over the slowest one that is needed.

    layers_ms: (N, L) time of each layer on each of the nodes. Prices to start from, not a bound.
    """
    need_bytes = _layers_bytes(cost)
    budgets = np.array([cost.nodes[i].budget_bytes for i in nodes], dtype=np.float64)
    byte_ms = layers_ms.sum(axis=1) / max(need_bytes.sum(), 1.0)  # (N,)
    order = np.argsort(byte_ms)
    last = min(int(np.searchsorted(np.cumsum(budgets[order]), need_bytes.sum())), len(nodes) - 1)
    prices: Floats = np.maximum(0.0, FILLED * budgets * (byte_ms[order[last]] - byte_ms))
    return prices


def fluid_bounds(
    cost: CostModel, nodes: Sequence[int], hop: Floats, layers_ms: Floats
) -> tuple[float, float]:
    """(sum, slowest stage), ms. layers_ms: (N, L) time of each layer on each of the nodes.

    A layer's work is its time where that is least; a node's rate is the most work that it does in a ms, of
    any layer. inf where the budgets of all nodes together are too small.
    """
    layer_work = layers_ms.min(axis=0)  # (L,)
    rates = (layer_work / layers_ms).max(axis=1)  # (N,)
    need_bytes = _layers_bytes(cost)
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
    stage_ms = min(cost.stage_ms(i) for i in nodes)
    least_ms = work_ms + num_stages * stage_ms + hops_ms
    return least_ms, float(layer_work.sum() / rates.sum())


def _layers_bytes(cost: CostModel) -> Floats:
    return np.array([cost.layer_bytes(i) for i in range(cost.model.num_layers)], dtype=np.float64)
