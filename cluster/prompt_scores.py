"""How probable the tokens of a prompt were, each behind those before it. Compute thread only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from cluster.row_draws import add_top
from cluster.sampler import log_softmax
from cluster.session import Session
from proto import ring_pb2


class PromptScores:
    """Log-probabilities of known tokens: lazy until the caller has evaluated `arrays()`."""

    def __init__(self, logits: mx.array, ids: Sequence[int], num_top: int) -> None:
        """logits: (T, vocab) of any float type, before the T tokens `ids`; num_top others for each."""
        logprobs = log_softmax(logits.astype(mx.float32))  # (T, vocab)
        self._ids = ids
        chosen = mx.array(list(ids), dtype=mx.uint32)[:, None]  # (T, 1)
        self._chosen = mx.take_along_axis(logprobs, chosen, axis=-1)[:, 0]
        self._top: list[mx.array] = []  # ids and log-probabilities, (T, num_top) each
        if num_top := min(num_top, logits.shape[-1]):
            top = mx.argpartition(-logprobs, kth=num_top - 1, axis=-1)[:, :num_top]
            self._top = [top, mx.take_along_axis(logprobs, top, axis=-1)]

    def arrays(self) -> list[mx.array]:
        """What the caller evaluates."""
        return [self._chosen, *self._top]

    def finish(self) -> list[ring_pb2.SampledToken]:
        """The tokens, in their order; `top` as a draw has it."""
        logprobs = cast("list[float]", self._chosen.tolist())
        tokens = [
            ring_pb2.SampledToken(id=token, logprob=logprob)
            for token, logprob in zip(self._ids, logprobs, strict=True)
        ]
        if self._top:
            ids, others = (cast("list[list[Any]]", array.tolist()) for array in self._top)
            for token, top, top_logprobs in zip(tokens, ids, others, strict=True):
                add_top(token, top, top_logprobs)
        return tokens


def prompt_scores(session: Session, slot: ring_pb2.Slot, logits: mx.array | None) -> PromptScores | None:
    """Those of the slot's tokens, where the request asks for them and they are its prompt's.

    logits: (T, vocab), of the slot's T tokens; None where only the last was read, and its own draw is made
    already. The session keeps what the next slot's first token is held against.
    """
    if not session.is_scored or slot.position >= session.spec.prompt_tokens:
        return None
    before, session.last_logits = session.last_logits, None
    rows = [] if before is None else [before]
    if logits is not None:
        if len(slot.tokens) > 1:
            rows.append(logits[:-1])
        if not slot.is_sampled:  # a copy: a slice would keep all of them
            session.last_logits = mx.take(logits, mx.array([len(slot.tokens) - 1]), axis=0)
    if not rows:  # the prompt's first token, behind nothing
        return None
    ids = list(slot.tokens) if before is not None else list(slot.tokens[1:])
    return PromptScores(mx.concatenate(rows), ids, session.spec.sampling.top_logprobs)
