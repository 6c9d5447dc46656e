"""What a draft model takes of rank 0's memory, and why it may not fit there. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.cost import FUSED_HEAD_DIMS, HEAD_RANK
from planner.draft_part import DraftPart
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Refusal
from planner.sizes import gb
from planner.stage_bytes import StageBytes
from planner.workload import Workload

# Tokens of a prompt that the draft model reads in one piece: a frame that comes meanwhile waits for no more.
READ_CHUNK_TOKENS = 128
# So few are read together with the first draw; of more, the last one alone makes logits.
MAX_LOGIT_ROWS = 16
OTHERWISE = 'set speculation.method to "ngram"'


def session_bytes(draft: ModelProfile, num_tokens: int) -> int:
    """A draft model's caches of one session of so many tokens."""
    return sum(layer.cache.nbytes(num_tokens, READ_CHUNK_TOKENS) for layer in draft.layers)


def keeps_all(draft: ModelProfile) -> bool:
    """Whether its caches keep every token, so that they can go back to any."""
    return not any(layer.cache.window is not None or layer.cache.state_bytes for layer in draft.layers)


class DraftBytes(StageBytes):
    """Bytes of a model that makes logits for a few tokens only."""

    def activation(self, start: int, stop: int, is_fused: bool) -> int:
        """Scratch of one piece of work: an upper bound, that of a stage whose chunks are larger.

        Caches that cannot go back are copied for each window of guesses.
        """
        model = self.model
        total = super().activation(start, stop, is_fused)
        total -= max(0, self.chunk_tokens - MAX_LOGIT_ROWS) * model.vocab_size * model.dtype_bytes
        if not keeps_all(model):
            total += session_bytes(model, self.work.context)
        return total


def draft_part(draft: ModelProfile, node: NodeProfile, context: int, concurrency: int) -> DraftPart:
    """The draft model `draft` on `node`, for so many requests of `context` tokens at once."""
    work = Workload(min(context, draft.max_context), concurrency)
    is_fused = node.device != "cpu" and draft.head_dim in FUSED_HEAD_DIMS
    sizes, num_layers = DraftBytes(draft, work), draft.num_layers
    return DraftPart(
        model=draft.name,
        rank=node.rank,
        node=node.name,
        weight_bytes=sizes.weights(0, num_layers).total_bytes,
        kv_bytes=session_bytes(draft, work.context) * concurrency,
        activation_bytes=sizes.activation(0, num_layers, is_fused),
    )


def with_drafter(
    nodes: Sequence[NodeProfile], draft: ModelProfile | None, context: int, concurrency: int
) -> list[NodeProfile]:
    """The nodes, the head's with the draft model on it; whether it owns layers or not."""
    return [
        replace(node, drafter=draft_part(draft, node, context, concurrency))
        if draft is not None and node.rank == HEAD_RANK
        else node
        for node in nodes
    ]


def without_drafter(nodes: Sequence[NodeProfile]) -> list[NodeProfile]:
    """The same nodes with all of their budgets."""
    return [replace(node, drafter=None) for node in nodes]


def drafter_on(nodes: Sequence[NodeProfile]) -> DraftPart | None:
    """The draft model that one of them holds."""
    return next((node.drafter for node in nodes if node.drafter is not None), None)


def refuse_drafter(nodes: Sequence[NodeProfile]) -> Refusal | None:
    """Why no plan can have this draft model; None where its node has room, or nothing is known of it."""
    part = drafter_on(nodes)
    if part is None:
        return None
    node = next(node for node in without_drafter(nodes) if node.rank == part.rank)
    missing_bytes = part.need_bytes - node.budget_bytes
    if missing_bytes <= 0 or not node.memory_bytes:
        return None
    return Refusal(
        reason=(
            f"the draft model {part.model} needs {gb(part.weight_bytes)} for its weights, "
            f"{gb(part.kv_bytes)} for keys and values and {gb(part.activation_bytes)} of scratch on "
            f"{part.node}, whose budget is {gb(node.budget_bytes)}"
        ),
        missing_bytes=missing_bytes,
        advice=f"Take a smaller draft model or a smaller context, or {OTHERWISE}.",
    )


def advise_without(refusal: Refusal, part: DraftPart) -> Refusal:
    """The refusal of a model that would fit without the draft model."""
    advice = refusal.advice[:1].lower() + refusal.advice[1:]
    return replace(
        refusal,
        advice=f"{OTHERWISE[:1].upper()}{OTHERWISE[1:]}: without the draft model, which takes "
        f"{gb(part.need_bytes)} of {part.node}, it fits; or {advice}",
    )
