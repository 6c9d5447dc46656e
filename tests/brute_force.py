"""Every ring of a small cluster: all subsets of its nodes, all their orders, all cuts. No part of the solver.

It asks the cost model for single stages and hops only, and adds them up itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from planner.cost import CostModel, Stage


@dataclass(frozen=True, slots=True)
class Best:
    """Over all rings, of those that exceed their budgets by the least; inf where there is none."""

    latency_ms: float
    throughput_ms: float  # per token of all users
    ttft_ms: float
    overflow_bytes: float  # the least by which any ring exceeds its budgets
    most_stages: int  # of the rings that fit

    @property
    def is_feasible(self) -> bool:
        return self.overflow_bytes == 0


def all_rings(cost: CostModel, legal: frozenset[int] | None = None) -> Iterator[list[Stage]]:
    """Every ring, whether it fits or not; forced nodes own their range, and others nothing of it."""
    num_layers = cost.model.num_layers
    forced = {i: node.layers for i, node in enumerate(cost.nodes) if node.use and node.layers is not None}

    def extend(ring: list[Stage], at: int) -> Iterator[list[Stage]]:
        if at == num_layers:
            if forced.keys() <= {stage.index for stage in ring}:
                yield list(ring)
            return
        for i, node in enumerate(cost.nodes):
            if not node.use or any(stage.index == i for stage in ring):
                continue
            for stop in range(at + 1, num_layers + 1):
                if stop < num_layers and legal is not None and stop not in legal:
                    continue
                if i in forced and forced[i] != (at, stop):
                    continue
                ring.append(Stage(i, at, stop))
                yield from extend(ring, stop)
                ring.pop()

    return extend([], 0)


def brute_force(cost: CostModel, legal: frozenset[int] | None = None, *, keeps_order: bool = False) -> Best:
    """The best value of each objective, each perhaps of another ring; keeps_order: in the nodes' order."""
    num_layers, users, chunk = cost.model.num_layers, cost.work.concurrency, cost.work.mean_chunk_tokens
    ends = [*range(len(cost.nodes)), None]
    rows = min(cost.work.rows, users)
    hop = {
        (a, b): (
            cost.hop_between_ms(a, b, 1),
            cost.hop_between_ms(a, b, chunk),
            cost.transfer_ms(a, b, chunk),
            cost.hop_between_ms(a, b, cost.work.rows),
            cost.transfer_ms(a, b, cost.work.rows),
        )
        for a in ends
        for b in ends
    }
    ranges = [(a, b) for a in range(num_layers) for b in range(a + 1, num_layers + 1)]
    stage = {
        (i, a, b): (
            cost.decode_ms(i, a, b),
            cost.chunk_ms(i, a, b),
            cost.overflow_bytes(i, a, b),
            cost.decode_ms(i, a, b, is_batched=True),
        )
        for i in range(len(cost.nodes))
        for a, b in ranges
    }
    best = [(math.inf, math.inf)] * 3  # (bytes over, ms)
    most_stages = 0
    for ring in all_rings(cost, legal):
        if keeps_order and any(a.index > b.index for a, b in itertools.pairwise(ring)):
            continue
        stages = [stage[s.index, s.start, s.stop] for s in ring]
        at = [None, *(s.index for s in ring), None]
        hops = [hop[pair] for pair in itertools.pairwise(at)]
        decode_ms = sum(s[0] for s in stages) + sum(h[0] for h in hops)
        fill_ms = sum(s[1] for s in stages) + sum(h[1] for h in hops) + stages[-1][0]
        beat_ms = max(*(s[1] for s in stages), *(h[2] for h in hops))
        round_ms = sum(s[3] for s in stages) + sum(h[3] for h in hops)
        busiest_ms = max(*(s[3] for s in stages), *(h[4] for h in hops))
        over = sum(s[2] for s in stages)
        values = (
            decode_ms,
            max(round_ms / users, busiest_ms / rows),
            fill_ms + (cost.work.num_chunks - 1) * beat_ms,
        )
        best = [min(least, (over, value)) for least, value in zip(best, values, strict=True)]
        if not over:
            most_stages = max(most_stages, len(ring))
    return Best(*(value for _, value in best), best[0][0], most_stages)
