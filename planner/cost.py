"""Predicted bytes and milliseconds of a stage, a hop and a ring. Pure arithmetic; every constant has its
source.

A decode step reads the active weights and the cached keys and values once, so it is bound by memory
bandwidth; a prefill chunk is bound by the matrix rate, or by reading the weights once. Both add what
launching the work costs. The time of a token is the sum over its stages and its hops: only one stage
works for one user at a time. The chunks of a prompt follow each other through the stages. docs/cost_model.md
has every term on one page.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.layer_times import Floats, LayerTimes
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import num_frames
from planner.speeds import Speeds
from planner.stage_bytes import StageBytes, StageWeights
from planner.workload import Workload

# A link that the configuration does not describe.
LOCAL_LATENCY_MS, LOCAL_GBIT_S = 0.1, 20.0
REMOTE_LATENCY_MS, REMOTE_GBIT_S = 0.5, 10.0
FRAME_BYTES = 256  # what a frame carries beside the hidden state
HEAD_RANK = 0
# Head sizes for which MLX's attention does not write its scores to memory on a GPU.
FUSED_HEAD_DIMS = (64, 80, 96, 128)


@dataclass(frozen=True, slots=True)
class Link:
    """A known link between two ranks; None: the default for their hosts."""

    ranks: frozenset[int]
    latency_ms: float | None = None
    bandwidth_gbit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers [start, stop) on the node at `index` of the cost model's nodes."""

    index: int
    start: int
    stop: int


class CostModel:
    """Bytes and times of any stage on any node, from sums prepared once. Layer ranges are half-open."""

    def __init__(
        self, model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], work: Workload
    ) -> None:
        self.model, self.nodes, self.links, self.work = model, tuple(nodes), tuple(links), work
        self._links = {link.ranks: link for link in self.links}
        self._hosts = {node.rank: node.host for node in nodes}
        self._bytes, self._times = StageBytes(model, work), LayerTimes(model, work)
        self._speeds = [node.speeds for node in nodes]
        first: dict[Speeds, int] = {}
        self._like = [first.setdefault(speeds, i) for i, speeds in enumerate(self._speeds)]
        self._decode_ms: dict[tuple[int, bool], Floats] = {}  # by the first node with these speeds
        self._chunk_ms: dict[int, Floats] = {}
        self._by_rows: dict[int, CostModel] = {}
        self._params = [0, *itertools.accumulate(layer.active_params for layer in model.layers)]

    # -- bytes --------------------------------------------------------------------------------------------
    def weight_bytes(self, start: int, stop: int) -> int:
        """Weights of a stage, with the embedding, norm and head that it owns; a tied copy counts."""
        return self._bytes.weights(start, stop).total_bytes

    def weights(self, start: int, stop: int) -> StageWeights:
        """The same by part."""
        return self._bytes.weights(start, stop)

    def kv_bytes(self, start: int, stop: int) -> int:
        """Caches of a stage for context x concurrency, with its copies of those that it shares."""
        return self._bytes.kv(start, stop)

    def activation_bytes(self, index: int, start: int, stop: int) -> int:
        """Scratch of a stage for one prefill chunk: an upper bound."""
        return self._bytes.activation(start, stop, self.is_fused(index))

    def layer_bytes(self, layer: int) -> int:
        """Weights and caches of one layer alone, which is the least that it takes of a stage."""
        return self._bytes.layer(layer)

    def is_fused(self, index: int) -> bool:
        """True where a node's attention does not write its scores to memory."""
        return self.nodes[index].device != "cpu" and self.model.head_dim in FUSED_HEAD_DIMS

    def node_key(self, index: int) -> tuple[object, ...]:
        """What a node's stages depend on: equal for nodes of one kind."""
        node = self.nodes[index]
        return node.budget_bytes, node.device, self._like[index], node.layers

    def need_bytes(self, index: int, start: int, stop: int) -> int:
        """What a stage takes of its node's budget."""
        return self._bytes.need(start, stop, self.is_fused(index))

    def need_table(self, index: int, bounds: Sequence[int]) -> NDArray[np.int64]:
        """(B, B) of all stages between B boundaries."""
        return self._bytes.need_table(bounds, self.is_fused(index))

    def overflow_bytes(self, index: int, start: int, stop: int) -> int:
        """By how much a stage exceeds its node's budget; 0 where it fits."""
        return max(0, self.need_bytes(index, start, stop) - self.nodes[index].budget_bytes)

    def active_params(self, start: int, stop: int) -> int:
        """Weights that one token is multiplied with."""
        return self._params[stop] - self._params[start]

    # -- time of a stage ----------------------------------------------------------------------------------
    def decode_ms(self, index: int, start: int, stop: int, *, is_batched: bool = False) -> float:
        """One token of one user at half the context; is_batched: of each of `work.rows` users."""
        sums = self.decode_sums_ms(index, is_batched=is_batched)
        head_ms = sums[-1] - sums[-2] if stop == self.model.num_layers else 0.0
        return float(sums[stop] - sums[start] + head_ms) + self.stage_ms(index)

    def prefill_ms(self, index: int, start: int, stop: int) -> float:
        """A prompt of `work.prompt_tokens` tokens: all chunks, and the step of its last token."""
        return self.work.num_chunks * self.chunk_ms(index, start, stop) + self.decode_ms(index, start, stop)

    def chunk_ms(self, index: int, start: int, stop: int) -> float:
        """One chunk of that prompt."""
        sums = self.chunk_sums_ms(index)
        return float(sums[stop] - sums[start]) + self.stage_ms(index)

    def stage_ms(self, index: int) -> float:
        """What waking the node costs."""
        return self._speeds[index].stage_ms

    def decode_sums_ms(self, index: int, *, is_batched: bool = False) -> Floats:
        """(L + 2,) sums of a decode step over the layers and, last, norm and head."""
        key = self._like[index], is_batched
        if key not in self._decode_ms:
            self._decode_ms[key] = self._times.decode_ms(self._speeds[index], is_batched=is_batched)
        return self._decode_ms[key]

    def chunk_sums_ms(self, index: int) -> Floats:
        """(L + 2,) sums of a prefill chunk over the layers; the last token's step has norm and head."""
        key = self._like[index]
        if key not in self._chunk_ms:
            self._chunk_ms[key] = self._times.chunk_ms(self._speeds[index])
        return self._chunk_ms[key]

    # -- time of hops and rings ---------------------------------------------------------------------------
    def hop_ms(self, from_rank: int, to_rank: int, tokens: int) -> float:
        """A frame with the hidden states of `tokens` tokens from rank to rank; 0 tokens: ids only."""
        if from_rank == to_rank:
            return 0.0
        latency_ms, gbit_s = self._link(from_rank, to_rank)
        return latency_ms + self.frame_bytes(tokens) * 8 / (gbit_s * 1e6)

    def transfer_ms(self, a: int | None, b: int | None, tokens: int) -> float:
        """How long a hop keeps its link busy: without the latency."""
        from_rank, to_rank = (HEAD_RANK if i is None else self.nodes[i].rank for i in (a, b))
        if from_rank == to_rank:
            return 0.0
        carried = 0 if a is None or b is None else tokens
        return self.frame_bytes(carried) * 8 / (self._link(from_rank, to_rank)[1] * 1e6)

    def hop_between_ms(self, a: int | None, b: int | None, tokens: int) -> float:
        """A hop between the nodes at two indices; None is the head, to and from which only token ids go."""
        if a is None or b is None:
            from_rank, to_rank = (HEAD_RANK if i is None else self.nodes[i].rank for i in (a, b))
            return self.hop_ms(from_rank, to_rank, 0)
        return self.hop_ms(self.nodes[a].rank, self.nodes[b].rank, tokens)

    def hops_ms(self, stages: Sequence[Stage], tokens: int) -> float:
        """All hops of one round: head to first stage, stage to stage, last stage to head."""
        indices = [None, *(stage.index for stage in stages), None]
        return sum(self.hop_between_ms(a, b, tokens) for a, b in itertools.pairwise(indices))

    def path_ms(self, stages: Sequence[Stage], *, is_batched: bool = False) -> float:
        """One frame once round the ring: a token of one user; is_batched: of each of `work.rows` users."""
        rows = self.work.rows if is_batched else 1
        steps_ms = (self.decode_ms(s.index, s.start, s.stop, is_batched=is_batched) for s in stages)
        return sum(steps_ms) + self.hops_ms(stages, rows)

    def beat_ms(self, stages: Sequence[Stage], *, is_batched: bool = False) -> float:
        """What keeps the busiest stage or link busy for one frame."""
        rows = self.work.rows if is_batched else 1
        steps_ms = (self.decode_ms(s.index, s.start, s.stop, is_batched=is_batched) for s in stages)
        return max(*steps_ms, *self._transfers_ms(stages, rows))

    def throughput_tok_s(self, stages: Sequence[Stage]) -> float:
        """All users together.

        Each frame brings a token to each of its rows: `concurrency` tokens a round, unless the busiest
        stage or link is always busy first. Where a frame may carry `work.max_rows`, users are spread evenly
        over the frames that the head keeps in flight.
        """
        users, rows = self.work.concurrency, min(self.work.rows, self.work.concurrency)
        if self.work.max_rows > 1:
            return self._shared_tok_s(stages)
        path_ms, beat_ms = (each(stages, is_batched=True) for each in (self.path_ms, self.beat_ms))
        return 1e3 / max(path_ms / users, beat_ms / rows)

    def _shared_tok_s(self, stages: Sequence[Stage]) -> float:
        """A round of all frames takes a frame's way, or as long as the busiest stage or link has to do."""
        stages_ms = [self.decode_ms(s.index, s.start, s.stop) for s in stages]
        frames = num_frames(1e3 / self.path_ms(stages), stages_ms)
        shares = Counter(self.work.shares(frames))
        beats_ms = {rows: self._with_rows(rows).beat_ms(stages, is_batched=True) for rows in shares}
        busy_ms = sum(count * beats_ms[rows] for rows, count in shares.items())
        way_ms = self._with_rows(max(shares)).path_ms(stages, is_batched=True)
        return self.work.concurrency * 1e3 / max(way_ms * max(1.0, shares.total() / frames), busy_ms)

    def _with_rows(self, rows: int) -> CostModel:
        """The same for frames of exactly so many rows."""
        if rows not in self._by_rows:
            work = replace(self.work, rows=rows, max_rows=1)
            self._by_rows[rows] = CostModel(self.model, self.nodes, self.links, work)
        return self._by_rows[rows]

    def ttft_ms(self, stages: Sequence[Stage]) -> float:
        """Prompt to first token.

        The first chunk passes all stages and hops; the others follow at the pace of the slowest stage or
        link; behind them the last stage makes the step of the prompt's last token.
        """
        tokens = self.work.mean_chunk_tokens
        chunks_ms = [self.chunk_ms(s.index, s.start, s.stop) for s in stages]
        transfers_ms = self._transfers_ms(stages, tokens)
        last = stages[-1]
        return (
            sum(chunks_ms)
            + self.hops_ms(stages, tokens)
            + (self.work.num_chunks - 1) * max(*chunks_ms, *transfers_ms)
            + self.decode_ms(last.index, last.start, last.stop)
        )

    def link_between(self, from_rank: int, to_rank: int) -> tuple[float, float]:
        """Latency in ms, one way, and bandwidth in Gbit/s between two different ranks."""
        return self._link(from_rank, to_rank)

    # -- parts --------------------------------------------------------------------------------------------
    def frame_bytes(self, tokens: int) -> int:
        """A frame with what so many tokens take across the widest cut."""
        return tokens * self.model.carry_bytes + FRAME_BYTES

    def _transfers_ms(self, stages: Sequence[Stage], tokens: int) -> list[float]:
        indices = [None, *(stage.index for stage in stages), None]
        return [self.transfer_ms(a, b, tokens) for a, b in itertools.pairwise(indices)]

    def _link(self, a: int, b: int) -> tuple[float, float]:
        is_local = a in self._hosts and self._hosts.get(a) == self._hosts.get(b)
        latency_ms, gbit_s = (
            (LOCAL_LATENCY_MS, LOCAL_GBIT_S) if is_local else (REMOTE_LATENCY_MS, REMOTE_GBIT_S)
        )
        link = self._links.get(frozenset((a, b)))
        if link is not None and link.latency_ms is not None:
            latency_ms = link.latency_ms
        if link is not None and link.bandwidth_gbit_s is not None:
            gbit_s = link.bandwidth_gbit_s
        return latency_ms, gbit_s
