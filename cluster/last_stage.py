"""What the last stage makes of a frame: tokens drawn, a prompt's own scored, or one vector.

Compute thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cluster.pooled_prompt import PooledPrompt, to_bytes
from cluster.prompt_scores import PromptScores, prompt_scores
from cluster.row_draws import RowDraws
from cluster.sampler import draw_rows
from cluster.session import Session
from cluster.step import Steps, Wanted
from cluster.trace_recorder import Kind, recorder
from proto import ring_pb2
from shard_loader.landing import Landing


@dataclass(frozen=True, slots=True)
class Answers:
    """Adds to `out` what there is to tell of each slot of a frame."""

    slots: Sequence[ring_pb2.Slot]
    sessions: Sequence[Session]
    out: ring_pb2.Frame
    landing: Landing
    caches: Callable[[], list[mx.array]]  # which must not stay a graph: asked for as the frame is evaluated
    fail: Callable[[ring_pb2.Slot, Exception], str]  # a slot's request ends here; why, for its client

    def of(self, logits: mx.array | RowDraws) -> Steps[None]:
        """logits: (B, T, vocab), or the draws, where they were built ahead; of a prompt that is pooled its
        hidden states (1, T, hidden_size).
        """
        slots, sessions = self.slots, self.sessions
        if sessions[0].pooled is not None:
            assert isinstance(logits, mx.array)
            yield from self._pool(sessions[0].pooled, logits[0])
            return
        for session, slot in zip(sessions, slots, strict=True):
            session.history.extend(slot.tokens)
        scores = [
            prompt_scores(session, slot, logits[i] if isinstance(logits, mx.array) else None)
            for i, (session, slot) in enumerate(zip(sessions, slots, strict=True))
        ]
        if slots[0].is_sampled:
            yield from self._draw(logits, scores)
            return
        # Parts of prompts: their logits are computed only to score their tokens.
        last = [session.last_logits for session in sessions if session.last_logits is not None]
        yield Wanted(_arrays(scores), [*last, *self.caches()])
        for slot, score in zip(slots, scores, strict=True):
            added = self.out.slots.add(session=slot.session, position=slot.position)
            if score is not None:
                added.prompt.extend(score.finish())

    def _pool(self, pooled: PooledPrompt, hidden: mx.array) -> Steps[None]:
        """A part of a prompt, by itself; behind the last one there is its vector."""
        slot, session = self.slots[0], self.sessions[0]
        pooled.add(hidden)
        is_read = session.position == session.spec.prompt_tokens
        wanted = [pooled.vector()] if is_read else pooled.arrays()
        yield Wanted(wanted, self.caches())
        added = self.out.slots.add(session=slot.session, position=slot.position)
        if is_read:
            added.vector = to_bytes(wanted[0])

    def _draw(self, logits: mx.array | RowDraws, scores: Sequence[PromptScores | None]) -> Steps[None]:
        slots, sessions, seq = self.slots, self.sessions, self.out.seq
        num_draws = max(slots[0].num_draws, 1)  # guesses come by themselves, too
        began = time.perf_counter() if recorder.on else 0.0
        if isinstance(logits, RowDraws):
            draws = logits
        elif num_draws > 1:
            rows = [sessions[0].row(num_guessed) for num_guessed in reversed(range(num_draws))]
            draws = draw_rows(rows, logits[0, -num_draws:])
        else:
            draws = draw_rows([session.row() for session in sessions], logits[:, -1])
        if began:
            if recorder.layers_per_span:
                mx.eval(draws.arrays())
            recorder.add(Kind.SAMPLED, seq, began, time.perf_counter())
        draws.land(self.landing)
        yield Wanted([*draws.arrays(), *_arrays(scores)], self.caches())
        began = time.perf_counter() if recorder.on else 0.0
        if num_draws > 1:
            self._add(slots[0], draws.until(slots[0].tokens[1 - num_draws :]))
        else:
            for slot, token, score in zip(slots, draws.finish(), scores, strict=True):
                added = self._add(slot, [token])
                if score is not None:
                    added.prompt.extend(score.finish())
        if began:
            recorder.add(Kind.SAMPLED, seq, began, time.perf_counter())

    def _add(self, slot: ring_pb2.Slot, drawn: Sequence[ring_pb2.SampledToken | ValueError]) -> ring_pb2.Slot:
        added = self.out.slots.add(session=slot.session, position=slot.position, is_sampled=True)
        for i, token in enumerate(drawn):
            if isinstance(token, Exception):  # of this row alone
                added.error = self.fail(slot, token)
            elif i:
                added.more.append(token)
            else:
                added.result.CopyFrom(token)
        return added


def _arrays(scores: Sequence[PromptScores | None]) -> list[mx.array]:
    return [array for score in scores if score is not None for array in score.arrays()]
