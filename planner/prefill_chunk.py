"""How many tokens of a prompt go in one frame, where the cluster file does not say. Pure.

While no answer is written, that is as many as the plan reserves memory for. While some are, a frame of theirs
waits behind a chunk on every stage: then chunks are as small as the gap between two tokens asks, but not so
small that their products waste what a device can do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.cost import CostModel, Stage
from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.plan import Plan

MIN_CHUNK = 64  # tokens; products of fewer rows are hardly faster
GAP_FACTOR = 2.0  # a prompt may make the gap between two tokens of an answer so many times as long ...
GAP_MS = 100.0  # ... and as long as this in any case: ten tokens a second are as fast as people read


@dataclass(frozen=True, slots=True)
class PromptChunks:
    """Tokens of a prompt in one frame, at most. shared: while answers are written. Raises ValueError."""

    alone: int = PREFILL_CHUNK_TOKENS
    shared: int = PREFILL_CHUNK_TOKENS

    def __post_init__(self) -> None:
        if not 1 <= self.shared <= self.alone:
            raise ValueError(f"shared = {self.shared} must be from 1 to alone = {self.alone}")


def choose_chunks(cost: CostModel, plan: Plan) -> PromptChunks:
    """The chunks of the ring that `plan` makes of the nodes of `cost`.

    alone: what is planned for. shared: the largest of it, its half, its quarter ... down to MIN_CHUNK that
    keeps the gap between two tokens below GAP_FACTOR times that without a prompt, or below GAP_MS.
    """
    alone = tokens = cost.work.chunk_tokens
    while tokens // 2 >= MIN_CHUNK and gap_ms(cost, plan, tokens) > gap_limit_ms(plan):
        tokens //= 2
    return PromptChunks(alone, tokens)


def gap_ms(cost: CostModel, plan: Plan, tokens: int) -> float:
    """Between two tokens of an answer, while a prompt is read in chunks of so many.

    All answers share a frame, and it comes round once the chunks before it are through the slowest stage.
    """
    index = {node.rank: i for i, node in enumerate(cost.nodes)}
    chunked = CostModel(cost.model, cost.nodes, cost.links, replace(cost.work, chunk_tokens=tokens))
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
