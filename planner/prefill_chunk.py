"""How many tokens of a prompt go in one frame, where the cluster file does not say. Pure.

While no answer is written, that is what the plan reserves memory for: more than PREFILL_CHUNK_TOKENS where
the cost model has a first token come sooner for it and the plan's stages have room. While some are, a frame
of theirs waits behind a chunk on every stage: then chunks are as small as the gap between two tokens asks,
but not so small that their products waste what a device can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.cost import CostModel, Stage
from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.plan import Plan

LARGER = (1024, 2048)  # tokens; mlx-lm reads a prompt in chunks of 2048
MAX_WAITING_BYTES = 512 << 20  # of frames before one stage: with more, cluster.edge_sender gives it up
TIE = 0.02  # a first token so much sooner is not worth the scratch of a larger chunk, nor its longer pauses

MIN_CHUNK = 64  # tokens; products of fewer rows are hardly faster
GAP_FACTOR = 2.0  # a prompt may make the gap between two tokens of an answer so many times as long ...
GAP_MS = 40.0  # ... and as long as this in any case: 25 tokens a second are faster than people read


@dataclass(frozen=True, slots=True)
class PromptChunks:
    """Tokens of a prompt in one frame, at most. shared: while answers are written. Raises ValueError."""

    alone: int = PREFILL_CHUNK_TOKENS
    shared: int = PREFILL_CHUNK_TOKENS

    def __post_init__(self) -> None:
        if not 1 <= self.shared <= self.alone:
            raise ValueError(f"shared = {self.shared} must be from 1 to alone = {self.alone}")


def with_chunk(cost: CostModel, tokens: int, prompt: int = 0) -> CostModel:
    """The same cluster for chunks of so many tokens; prompt: of a prompt of so many, see Workload."""
    work = replace(cost.work, chunk_tokens=tokens, prompt=prompt)
    return CostModel(cost.model, cost.nodes, cost.links, work)


def num_lone_chunks(num_stages: int) -> int:
    """In the ring at once while no answer is written: each stage computes one, and builds the next."""
    return max(num_stages + 1, 2 * num_stages)


def can_cross(cost: CostModel, stages: Sequence[Stage]) -> bool:
    """Whether all chunks under way may wait before one stage, as they do where the last is the slowest.

    A token of most models takes 4 to 32 KB, but of some 100 KB and more.
    """
    if len(stages) == 1:
        return True
    frame_bytes = cost.frame_bytes(min(cost.work.chunk_tokens, cost.work.context))
    return num_lone_chunks(len(stages)) * frame_bytes <= MAX_WAITING_BYTES


def knows_speeds(cost: CostModel, stages: Sequence[Stage]) -> bool:
    """Whether each stage's node was measured or has a known chip: a floor says nothing of chunks."""
    nodes = (cost.nodes[stage.index] for stage in stages)
    return all(node.measured is not None or node.figures.is_known for node in nodes)


def choose_alone(rings: Mapping[int, tuple[CostModel, Sequence[Stage]]]) -> int:
    """Of the chunks that fit, each with its cost model and stages, the one for a prompt that is alone.

    The smallest that brings the first token within TIE of the soonest: of the prompt that the objective
    uses, and among those for which that is so, of one as long as the context.
    """
    soon = _near_least({n: cost.ttft_ms(stages) for n, (cost, stages) in rings.items()})
    late = {}
    for tokens in soon:
        cost, stages = rings[tokens]
        late[tokens] = with_chunk(cost, tokens, cost.work.context).ttft_ms(stages)
    return min(_near_least(late))


def _near_least(times_ms: Mapping[int, float]) -> list[int]:
    """Those whose time is within TIE of the least."""
    least_ms = min(times_ms.values())
    return [tokens for tokens, ms in times_ms.items() if ms <= (1 + TIE) * least_ms]


def choose_chunks(cost: CostModel, plan: Plan) -> PromptChunks:
    """The chunks of the ring that `plan` makes of the nodes of `cost`.

    alone: what is planned for. shared: the largest of it, its half, its quarter ... down to MIN_CHUNK that
    keeps the gap between two tokens below GAP_FACTOR times that without a prompt, or below GAP_MS.
    """
    alone = tokens = plan.chunk_tokens
    while tokens // 2 >= MIN_CHUNK and gap_ms(cost, plan, tokens) > gap_limit_ms(plan):
        tokens //= 2
    return PromptChunks(alone, tokens)


def gap_ms(cost: CostModel, plan: Plan, tokens: int) -> float:
    """Between two tokens of an answer, while a prompt is read in chunks of so many.

    All answers share a frame, and it comes round once the chunks before it are through the slowest stage.
    """
    index = {node.rank: i for i, node in enumerate(cost.nodes)}
    chunked = with_chunk(cost, tokens)
    stages = [Stage(index[part.rank], part.start, part.stop) for part in plan.assignments]
    chunk_ms = max(chunked.chunk_ms(stage.index, stage.start, stage.stop) for stage in stages)
    num_chunks = min(plan.frames_in_flight - 1, len(stages) + 1)
    return num_chunks * chunk_ms + _step_ms(plan)


def gap_limit_ms(plan: Plan) -> float:
    """What it may come to. Without a prompt each answer has a frame, and it comes round after all others."""
    return max(GAP_FACTOR * plan.frames_in_flight * _step_ms(plan), GAP_MS)


def _step_ms(plan: Plan) -> float:
    """One token of one answer on the slowest stage."""
    return max(part.decode_ms for part in plan.assignments)
