"""What is to be made small, as tables for the searches: stages, hops, and what keeps each busy. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from planner.any_order import Placed, Ring
from planner.best_ring import Value
from planner.hops import hop_tables
from planner.tables import Floats, StageTables

MAX_KEPT_ELEMENTS = 1 << 24  # of the tables of stages: 128 MiB


@dataclass(frozen=True, slots=True)
class Goal:
    """An objective: the sum over stages and hops, and what keeps a stage or a link busy at each beat."""

    stage: Callable[[int], Floats]  # (B, B) by node
    hop: Floats  # (N + 1, N + 1)
    busy_stage: Callable[[int], Floats]
    busy_hop: Floats
    value: Value | None  # of the sum and the longest beat; None: the sum
    layers: Callable[[int], Floats]  # (L,) time of each layer on a node, without what a stage adds

    def below(self, ring: Ring, limit_ms: float) -> Ring:
        """The ring's stages and hops of which none is busy for longer."""

        def stage(i: int) -> Floats:
            return np.where(self.busy_stage(i) <= limit_ms, ring.stage(i), np.inf)

        return replace(ring, stage=stage, hop=np.where(self.busy_hop <= limit_ms, ring.hop, np.inf))

    def beat_ms(self, stages: Sequence[Placed]) -> float:
        """What keeps the busiest stage or link busy."""
        head = len(self.hop) - 1
        ends = [head, *(s.index for s in stages), head]
        hops = [float(self.busy_hop[a, b]) for a, b in itertools.pairwise(ends)]
        return max(*hops, *(float(self.busy_stage(s.index)[s.start, s.stop]) for s in stages))


def goal_of(tables: StageTables, objective: str) -> Goal:
    """The goal of `latency`, `throughput` or `ttft`."""
    return _first_token(tables) if objective == "ttft" else _decode(tables, objective == "throughput")


def _decode(tables: StageTables, has_users: bool) -> Goal:
    """has_users: of all users together, whose frames carry `rows` tokens each."""
    cost, work = tables.cost, tables.cost.work
    stage = _Kept(partial(tables.decode_ms, is_batched=has_users), tables.size)
    hop, busy = hop_tables(cost, work.rows if has_users else 1)
    users, rows = work.concurrency, min(work.rows, work.concurrency)
    value = (lambda path_ms, beat_ms: max(path_ms / users, beat_ms / rows)) if has_users else None
    layers = partial(_layers_ms, tables, partial(cost.decode_sums_ms, is_batched=has_users))
    return Goal(stage, hop, stage, busy if has_users else np.zeros_like(hop), value, layers)


def _first_token(tables: StageTables) -> Goal:
    """The last stage makes the step of the prompt's last token besides."""
    cost = tables.cost
    chunk = _Kept(tables.chunk_ms, tables.size)

    def stage(i: int) -> Floats:
        table = chunk(i).copy()
        table[:, -1] += tables.decode_ms(i)[:, -1]
        return table

    hop, busy = hop_tables(cost, cost.work.mean_chunk_tokens)
    more = cost.work.num_chunks - 1
    value = (lambda total_ms, slowest_ms: total_ms + more * slowest_ms) if more else None
    layers = partial(_layers_ms, tables, cost.chunk_sums_ms)
    return Goal(_Kept(stage, tables.size), hop, chunk, busy, value, layers)


def _layers_ms(tables: StageTables, sums_of: Callable[[int], Floats], index: int) -> Floats:
    return np.diff(sums_of(index))[: tables.cost.model.num_layers]


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
