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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.kv_profile import PREFILL_CHUNK_TOKENS, CacheProfile
from planner.model_profile import LayerProfile, ModelProfile
from planner.node_profile import NodeProfile

# A link that the configuration does not describe.
LOCAL_LATENCY_MS, LOCAL_GBIT_S = 0.1, 20.0
REMOTE_LATENCY_MS, REMOTE_GBIT_S = 0.5, 10.0
FRAME_BYTES = 256  # what a frame carries beside the hidden state
HEAD_RANK = 0
Amount = TypeVar("Amount", np.float64, NDArray[np.float64])  # of one stage, or of many at once
# Head sizes for which MLX's attention does not write its scores to memory on a GPU.
FUSED_HEAD_DIMS = (64, 80, 96, 128)


@dataclass(frozen=True, slots=True)
class Link:
    """A known link between two ranks; None: the default for their hosts."""

    ranks: frozenset[int]
    latency_ms: float | None = None
    bandwidth_gbit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """What the ring is asked to do. Raises ValueError for a context or concurrency below 1."""

    context: int  # tokens of one request, prompt and answer
    concurrency: int  # requests at once

    def __post_init__(self) -> None:
        for key in ("context", "concurrency"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")

    @property
    def decode_context(self) -> int:
        """Tokens in the cache when decode is timed."""
        return self.context // 2

    @property
    def prompt_tokens(self) -> int:
        """The prompt that prefill is timed with."""
        return max(1, min(2048, self.context // 2))


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers [start, stop) on the node at `index` of the cost model's nodes."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StageWeights:
    """A stage's weights by part. A head tied to the embedding counts as head, unless the stage has both."""

    layers_bytes: int
    embed_bytes: int
    norm_bytes: int  # and what else stands outside the layers of the last stage
    head_bytes: int
    other_bytes: int = 0  # what the layers of every stage read

    @property
    def total_bytes(self) -> int:
        return self.layers_bytes + self.embed_bytes + self.norm_bytes + self.head_bytes + self.other_bytes


class CostModel:
    """Bytes and times of any stage on any node, from sums prepared once. Layer ranges are half-open."""

    def __init__(
        self, model: ModelProfile, nodes: Sequence[NodeProfile], links: Sequence[Link], work: Workload
    ) -> None:
        self.model, self.nodes, self.links, self.work = model, tuple(nodes), tuple(links), work
        self._links = {link.ranks: link for link in self.links}
        self._hosts = {node.rank: node.host for node in nodes}
        layers, middle = model.layers, work.decode_context
        self._sources = {i: x.cache_source for i, x in enumerate(layers) if x.cache_source is not None}
        self._weight = _sums(layer.weight_bytes for layer in layers)
        self._kv = _sums(layer.cache.nbytes(work.context) * work.concurrency for layer in layers)
        self._unquantized = _sums(
            CacheProfile(layer.cache.plain_token_bytes).nbytes(self.chunk_tokens) for layer in layers
        )
        self._read = _sums(layer.active_bytes + layer.cache.read_bytes(middle) for layer in layers)
        self._params = _sums(layer.active_params for layer in layers)
        self._chunk_read = _sums(layer.batch_bytes(self.mean_chunk_tokens) for layer in layers)
        self._chunk_flops = _sums(map(self._layer_chunk_flops, layers))
        self._scratch = {
            is_fused: [self._layer_scratch_bytes(i, is_fused) for i in range(len(layers))]
            for is_fused in (False, True)
        }

    # -- bytes --------------------------------------------------------------------------------------------
    def weight_bytes(self, start: int, stop: int) -> int:
        """Weights of a stage, with the embedding, norm and head that it owns; a tied copy counts."""
        return self.weights(start, stop).total_bytes

    def weights(self, start: int, stop: int) -> StageWeights:
        """The same by part."""
        model = self.model
        is_first, is_last = start == 0, stop == model.num_layers
        is_tied_copy = is_last and model.is_tied and not is_first
        read_bytes = 0 if is_first else model.shared_embed_bytes  # of the embedding, by every stage
        tied_bytes = (read_bytes or model.embed_bytes) if is_tied_copy else 0
        return StageWeights(
            layers_bytes=self._weight[stop] - self._weight[start],
            embed_bytes=model.embed_bytes if is_first else 0,
            norm_bytes=model.norm_bytes if is_last else 0,
            head_bytes=model.head_bytes + tied_bytes if is_last else 0,
            other_bytes=model.table_bytes + (0 if is_tied_copy else read_bytes),
        )

    def kv_bytes(self, start: int, stop: int) -> int:
        """Caches of a stage for context x concurrency, with its copies of those that it shares."""
        return self._kv[stop] - self._kv[start] + self._copies_bytes(start, stop)

    def activation_bytes(self, index: int, start: int, stop: int) -> int:
        """Scratch of a stage for one prefill chunk of 512 tokens: an upper bound.

        The fullest layer counts the outputs of all its linears, four hidden states, the attention scores
        where they are written to memory, the scan of a recurrent layer, and a second copy of one session's
        cache (it is copied when it grows). Where caches are quantised, those of one session's first chunk
        count in plain, and attention scores are always written to memory. The last stage adds the logits of
        the chunk, and four rows of them in float32 for the sampler.
        """
        model = self.model
        total = max(self._scratch[self.is_fused(index)][start:stop])
        total += self._unquantized[stop] - self._unquantized[start]
        if stop == model.num_layers:
            total += self.chunk_tokens * model.vocab_size * model.dtype_bytes + 16 * model.vocab_size
        return total

    def layer_bytes(self, layer: int) -> int:
        """Weights and caches of one layer alone, which is the least that it takes of a stage."""
        return self._weight[layer + 1] - self._weight[layer] + self._kv[layer + 1] - self._kv[layer]

    def is_fused(self, index: int) -> bool:
        """True where a node's attention does not write its scores to memory."""
        return self.nodes[index].device != "cpu" and self.model.head_dim in FUSED_HEAD_DIMS

    def need_bytes(self, index: int, start: int, stop: int) -> int:
        """What a stage takes of its node's budget."""
        return (
            self.weight_bytes(start, stop)
            + self.kv_bytes(start, stop)
            + self.activation_bytes(index, start, stop)
        )

    def overflow_bytes(self, index: int, start: int, stop: int) -> int:
        """By how much a stage exceeds its node's budget; 0 where it fits."""
        return max(0, self.need_bytes(index, start, stop) - self.nodes[index].budget_bytes)

    def active_params(self, start: int, stop: int) -> int:
        """Weights that one token is multiplied with."""
        return self._params[stop] - self._params[start]

    # -- time ---------------------------------------------------------------------------------------------
    def decode_ms(self, index: int, start: int, stop: int) -> float:
        """One token of one user at half the context."""
        return float(self.step_ms(index, np.float64(self.read_bytes(start, stop)), np.float64(stop - start)))

    def read_bytes(self, start: int, stop: int) -> int:
        """What one token of one user reads of weights, of the head where it is owned, and of the caches."""
        model = self.model
        read_bytes = self._read[stop] - self._read[start]
        if stop == model.num_layers:
            read_bytes += model.norm_bytes + (model.embed_bytes if model.is_tied else model.head_bytes)
        return read_bytes

    def step_ms(self, index: int, read_bytes: Amount, num_layers: Amount) -> Amount:
        """A decode step of a node that reads so much for so many layers."""
        speeds = self.nodes[index].speeds
        return read_bytes / speeds.read_bytes_ms + num_layers * speeds.layer_ms + speeds.stage_ms

    def prefill_ms(self, index: int, start: int, stop: int) -> float:
        """A prompt of `work.prompt_tokens` tokens: all chunks, and the step of its last token."""
        return self.num_chunks * self.chunk_ms(index, start, stop) + self.decode_ms(index, start, stop)

    def chunk_ms(self, index: int, start: int, stop: int) -> float:
        """One chunk of that prompt."""
        flops, read_bytes = self.chunk_flops(start, stop), self.chunk_read_bytes(start, stop)
        return float(self.pass_ms(index, np.float64(flops), np.float64(read_bytes), np.float64(stop - start)))

    def pass_ms(self, index: int, flops: Amount, read_bytes: Amount, num_layers: Amount) -> Amount:
        """Many tokens at once on a node: multiplying, or reading the weights."""
        multiply_ms = flops / self.rate_flops_ms(index)
        bound_ms: Amount = np.maximum(multiply_ms, read_bytes / self.rate_bytes_ms(index))
        return bound_ms + num_layers * self.nodes[index].speeds.layer_ms + self.nodes[index].speeds.stage_ms

    def chunk_flops(self, start: int, stop: int) -> int:
        """Floating-point operations of one chunk of the prompt; the last token's step has the head's."""
        return self._chunk_flops[stop] - self._chunk_flops[start]

    def chunk_read_bytes(self, start: int, stop: int) -> int:
        """Weights that one chunk of the prompt reads."""
        return self._chunk_read[stop] - self._chunk_read[start]

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

    def path_ms(self, stages: Sequence[Stage]) -> float:
        """One token of one user, once round the ring."""
        return sum(self.decode_ms(s.index, s.start, s.stop) for s in stages) + self.hops_ms(stages, 1)

    def slowest_ms(self, stages: Sequence[Stage]) -> float:
        """The decode time of the slowest stage."""
        return max(self.decode_ms(s.index, s.start, s.stop) for s in stages)

    def throughput_tok_s(self, stages: Sequence[Stage]) -> float:
        """All users together.

        `concurrency` tokens per round, unless the slowest stage is always busy first.
        """
        return 1e3 / max(self.path_ms(stages) / self.work.concurrency, self.slowest_ms(stages))

    def ttft_ms(self, stages: Sequence[Stage]) -> float:
        """Prompt to first token.

        The first chunk passes all stages and hops; the others follow at the pace of the slowest stage or
        link; behind them the last stage makes the step of the prompt's last token.
        """
        tokens = self.mean_chunk_tokens
        chunks_ms = [self.chunk_ms(s.index, s.start, s.stop) for s in stages]
        indices = [None, *(stage.index for stage in stages), None]
        transfers_ms = [self.transfer_ms(a, b, tokens) for a, b in itertools.pairwise(indices)]
        last = stages[-1]
        return (
            sum(chunks_ms)
            + self.hops_ms(stages, tokens)
            + (self.num_chunks - 1) * max(*chunks_ms, *transfers_ms)
            + self.decode_ms(last.index, last.start, last.stop)
        )

    # -- parts --------------------------------------------------------------------------------------------
    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest prefill chunk."""
        return min(PREFILL_CHUNK_TOKENS, self.work.context)

    def frame_bytes(self, tokens: int) -> int:
        """A frame with the hidden states of so many tokens."""
        return tokens * self.model.hidden_size * self.model.dtype_bytes + FRAME_BYTES

    @property
    def num_chunks(self) -> int:
        """Chunks of the prompt before its last token, which goes alone; at least one."""
        return max(1, ceil((self.work.prompt_tokens - 1) / PREFILL_CHUNK_TOKENS))

    @property
    def mean_chunk_tokens(self) -> int:
        """Tokens of such a chunk, taken as equal."""
        return max(1, ceil((self.work.prompt_tokens - 1) / self.num_chunks))

    def rate_flops_ms(self, index: int) -> float:
        """Floating-point operations that a node makes in a ms."""
        return self.nodes[index].speeds.flops_ms

    def rate_bytes_ms(self, index: int) -> float:
        """Bytes that a node reads in a ms."""
        return self.nodes[index].speeds.read_bytes_ms

    def _layer_chunk_flops(self, layer: LayerProfile) -> int:
        """Two for each weight and token; scores and their use cost two for each key and query element."""
        model, tokens = self.model, self.mean_chunk_tokens
        flops = 2 * layer.active_params * tokens
        if layer.score_copies:
            seen = min(self.work.prompt_tokens // 2, layer.cache.window or self.work.prompt_tokens)
            flops += 4 * model.num_heads * model.head_dim * seen * tokens
        return flops

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

    def _copies_bytes(self, start: int, stop: int) -> int:
        """Caches of layers of earlier stages that layers of this one read: the stage has them too."""
        if not self._sources:
            return 0
        layers = self.model.layers
        copied = {s for i, s in self._sources.items() if start <= i < stop and s < start}
        return sum(layers[s].cache.nbytes(self.work.context) for s in copied) * self.work.concurrency

    def _layer_scratch_bytes(self, i: int, is_fused: bool) -> int:
        model, layer, context = self.model, self.model.layers[i], self.work.context
        elements = self.chunk_tokens * (layer.output_width + 4 * model.hidden_size)
        if not is_fused or layer.cache.is_quantized:
            seen = min(context, (layer.cache.window or context) + PREFILL_CHUNK_TOKENS)
            elements += layer.score_copies * model.num_heads * self.chunk_tokens * seen
        return elements * model.dtype_bytes + layer.scan_bytes + layer.cache.nbytes(context)


def _sums(values: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(values)]
