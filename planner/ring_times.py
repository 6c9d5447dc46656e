"""What the simulator is told of a planned ring: how long each stage and link takes. Pure.

Written from docs/cost_model.md, layer by layer, and not from `planner/cost.py`, which it is compared with.
Where that takes chunks as equal and the widest cut for all, this takes each chunk and each cut as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.layer_profile import LayerProfile, WeightFormat
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Assignment, Plan
from planner.simulator import LinkTimes, RingTimes, StageTimes
from planner.speeds import Speeds

HEAD_RANK = 0
HEADER_BYTES = 256  # of a frame, beside what it carries
# Latency in ms and Gbit/s where the cluster file says nothing: on one host, and between two.
SAME_HOST = 0.1, 20.0
OTHER_HOST = 0.5, 10.0


class KnownLink(Protocol):
    """A link of the cluster file; None: not given."""

    @property
    def ranks(self) -> frozenset[int]: ...
    @property
    def latency_ms(self) -> float | None: ...
    @property
    def bandwidth_gbit_s(self) -> float | None: ...


def ring_times(
    plan: Plan,
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    links: Sequence[KnownLink],
    *,
    max_rows: int = 1,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> RingTimes:
    """The planned ring: a step at half the context, and a prompt of min(2048, context / 2) tokens.

    max_rows: users whose tokens one frame may carry together. chunk_tokens: of a prompt in a frame, at most.
    """
    by_rank = {node.rank: node for node in nodes}
    prompt = max(1, min(2048, plan.context // 2))
    chunks, more = prompt_chunks(prompt, chunk_tokens), range(2, max_rows + 1)
    stages = tuple(
        StageTimes(
            _decode_ms(model, part, by_rank[part.rank].speeds, plan.context // 2, 1),
            tuple(_chunk_ms(model, part, by_rank[part.rank].speeds, prompt, n) for n in chunks),
            tuple(_decode_ms(model, part, by_rank[part.rank].speeds, plan.context // 2, n) for n in more),
        )
        for part in plan.assignments
    )
    ranks = [HEAD_RANK, *(part.rank for part in plan.assignments), HEAD_RANK]
    cuts = [0, *(part.start for part in plan.assignments[1:]), model.num_layers]
    hops = []
    for start, from_rank, to_rank in zip([None, *cuts[1:-1], None], ranks, ranks[1:], strict=False):
        token_bytes = 0 if start is None else _cut_bytes(model, start)
        latency_ms, byte_ms = _line(links, by_rank, from_rank, to_rank)
        one, prompts, rows = (
            tuple(HEADER_BYTES + n * token_bytes for n in frames) for frames in ((1,), chunks, more)
        )
        hops.append(LinkTimes(latency_ms, byte_ms, one[0], prompts, rows))
    return RingTimes(stages, tuple(hops), plan.frames_in_flight)


def prompt_chunks(prompt_tokens: int, chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> tuple[int, ...]:
    """The chunks before the last token, which goes alone."""
    rest = prompt_tokens - 1
    full, last = divmod(rest, chunk_tokens)
    return (chunk_tokens,) * full + ((last,) if last else ())


def _decode_ms(model: ModelProfile, part: Assignment, speeds: Speeds, seen: int, rows: int) -> float:
    """A step of `rows` tokens, each after `seen` others."""
    total_ms = speeds.stage_ms
    for layer in model.layers[part.start : part.stop]:
        total_ms += speeds.layer_ms + rows * layer.cache.read_bytes(seen) / speeds.read_bytes_ms
        for weights in layer.weight_formats:
            rate = speeds.of(weights.format)
            total_ms += max(
                _read_bytes(layer, weights, rows) / speeds.read_bytes_ms,
                rows * weights.active_params / rate.weights_ms if rate else 0.0,
            )
    if part.stop == model.num_layers:
        nbytes = model.norm_bytes + (model.embed_bytes if model.is_tied else model.head_bytes)
        rate = speeds.of(model.head_format)
        total_ms += max(
            nbytes / speeds.read_bytes_ms, rows * model.head_params / rate.weights_ms if rate else 0.0
        )
    return total_ms


def _chunk_ms(model: ModelProfile, part: Assignment, speeds: Speeds, prompt: int, tokens: int) -> float:
    """A chunk of a prompt; each of its tokens sees half of the prompt, on average over all chunks."""
    total_ms = speeds.stage_ms
    for layer in model.layers[part.start : part.stop]:
        total_ms += speeds.layer_ms
        for weights in layer.weight_formats:
            rate = speeds.of(weights.format)
            flops_ms = rate.flops_ms if rate else speeds.flops_ms
            total_ms += max(
                _read_bytes(layer, weights, tokens) / speeds.read_bytes_ms,
                2 * tokens * weights.active_params / flops_ms,
            )
        if layer.score_copies:  # it has attention
            seen = prompt // 2 if layer.cache.window is None else min(prompt // 2, layer.cache.window)
            total_ms += 4 * tokens * model.num_heads * model.head_dim * seen / speeds.flops_ms
    return total_ms


def _read_bytes(layer: LayerProfile, weights: WeightFormat, tokens: int) -> float:
    """Of the experts those that at least one token is expected to choose."""
    return weights.dense_bytes + weights.routed_bytes * (1 - (1 - layer.routed_share) ** tokens)


def _cut_bytes(model: ModelProfile, layer: int) -> int:
    """Of one token before that layer."""
    return model.cut_bytes[layer] if model.cut_bytes else model.hidden_size * model.dtype_bytes


def _line(
    links: Sequence[KnownLink], nodes: dict[int, NodeProfile], from_rank: int, to_rank: int
) -> tuple[float, float]:
    """Latency in ms and ms a byte."""
    if from_rank == to_rank:
        return 0.0, 0.0
    ends = nodes.get(from_rank), nodes.get(to_rank)
    is_one_host = ends[0] is not None and ends[1] is not None and ends[0].host == ends[1].host
    latency_ms, gbit_s = SAME_HOST if is_one_host else OTHER_HOST
    for link in links:
        if link.ranks == {from_rank, to_rank}:
            latency_ms = latency_ms if link.latency_ms is None else link.latency_ms
            gbit_s = gbit_s if link.bandwidth_gbit_s is None else link.bandwidth_gbit_s
    return latency_ms, 8 / (gbit_s * 1e6)
