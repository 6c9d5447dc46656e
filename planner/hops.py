"""A cost model's hops as arrays over all pairs of nodes and the head, for the searches. Pure.

Shapes: (N + 1, N + 1) for N nodes, from row to column; the last row and column are the head's.
"""

from __future__ import annotations

import itertools

import numpy as np

from planner.cost import (
    HEAD_RANK,
    LOCAL_GBIT_S,
    LOCAL_LATENCY_MS,
    REMOTE_GBIT_S,
    REMOTE_LATENCY_MS,
    CostModel,
)
from planner.tables import Floats


def hop_tables(cost: CostModel, tokens: int) -> tuple[Floats, Floats]:
    """`CostModel.hop_between_ms` and `CostModel.transfer_ms` of every pair."""
    ranks = np.array([*(node.rank for node in cost.nodes), HEAD_RANK])
    by_rank = {node.rank: node.host for node in cost.nodes}
    hosts = [by_rank.get(rank) for rank in ranks.tolist()]
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    host = np.array([numbers[host] for host in hosts])
    is_local = host[:, None] == host[None, :]
    latency_ms = np.where(is_local, LOCAL_LATENCY_MS, REMOTE_LATENCY_MS)
    gbit_s = np.where(is_local, LOCAL_GBIT_S, REMOTE_GBIT_S)
    places: dict[int, list[int]] = {}
    for at, rank in enumerate(ranks.tolist()):
        places.setdefault(rank, []).append(at)
    for link in cost.links:
        for a, b in itertools.permutations(link.ranks, 2):
            where = np.ix_(places.get(a, []), places.get(b, []))
            if link.latency_ms is not None:
                latency_ms[where] = link.latency_ms
            if link.bandwidth_gbit_s is not None:
                gbit_s[where] = link.bandwidth_gbit_s
    nbytes = np.full(is_local.shape, cost.frame_bytes(tokens), dtype=np.float64)
    nbytes[-1, :] = nbytes[:, -1] = cost.frame_bytes(0)
    busy_ms = nbytes * 8 / (gbit_s * 1e6)
    is_same = ranks[:, None] == ranks[None, :]
    return np.where(is_same, 0.0, latency_ms + busy_ms), np.where(is_same, 0.0, busy_ms)
