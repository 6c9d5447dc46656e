"""Whether an architecture's sequences can go back after a wrong guess, tried on a tiny model of its config.

Guessed tokens are read several in a pass; where they were wrong, each stage goes back as far as it can
(`Reach`), what was right is read again if need be, and the sequence goes on token by token and in further
guesses. Each logit of a right token is held against the same sequence read token by token in the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from shard_loader.reach import Reach
from shard_loader.rehearsal import UNSUITABLE, Rehearsal
from shard_loader.state import ShardState

PROMPTS = (12, 2)  # tokens; the first is longer than every window of the tiny model, the second shorter
# (right, wrong) tokens of one pass after another; single ones between, for a window overwrites otherwise then
PASSES = ((2, 2), (3, 0), (1, 1), (1, 0), (1, 0), (1, 3), (2, 1), (1, 0), (4, 0), (1, 0))


def rewind_error(rehearsal: Rehearsal, boundaries: Sequence[int] = ()) -> float | None:
    """The largest difference of a logit, as a share of the largest logit; the model is cut at `boundaries`.

    None: the caches cannot go back, or it fails.
    """
    try:
        return _Trial(rehearsal, boundaries).run()
    except UNSUITABLE:
        return None


class _Trial:
    def __init__(self, rehearsal: Rehearsal, boundaries: Sequence[int]) -> None:
        self._model = rehearsal.model
        self._shards = rehearsal.shards(boundaries)
        self._reach = min(shard.reach for shard in self._shards)
        windows = [shard.trim_window or 0 for shard in self._shards]
        self._trim_window = min(windows)
        length = max(PROMPTS) + sum(right for right, _ in PASSES)
        self._tokens = rehearsal.tokens(2, length)  # (2, T): the first row is right, the second is wrong
        self._worst = 0.0

    def run(self) -> float | None:
        if self._reach == Reach.NONE:
            return None
        largest = 0.0
        for num_prompt in PROMPTS:
            expected = self._alone(num_prompt)
            largest = max(largest, _number(mx.abs(expected).max()))
            self._guess(num_prompt, expected)
        return self._worst / largest

    def _alone(self, num_prompt: int) -> mx.array:
        """What the whole model says after each token behind the prompt, (T, vocab)."""
        cache = make_prompt_cache(self._model)
        self._model(self._tokens[:1, :num_prompt], cache=cache)
        steps = range(num_prompt, self._tokens.shape[1])
        return mx.stack([self._model(self._tokens[:1, t : t + 1], cache=cache)[0, -1] for t in steps])

    def _guess(self, num_prompt: int, expected: mx.array) -> None:
        states = [shard.new_state() for shard in self._shards]
        self._forward(self._tokens[:1, :num_prompt], states)
        at = sent = num_prompt  # of the right tokens: those known, and those that the caches hold
        for right, wrong in PASSES:
            known = at
            at += right
            tokens = mx.concatenate([self._tokens[:1, sent:at], self._tokens[1:, at : at + wrong]], axis=1)
            if right + wrong > 1:
                for state in states:
                    state.mark()
            logits = self._forward(tokens, states)[0]
            self._compare(logits[known - sent : at - sent], expected[known - num_prompt : at - num_prompt])
            start, sent = sent, at
            if wrong:
                if self._reach == Reach.MARK:
                    sent = start
                elif at + wrong + 2 < self._trim_window:  # several guesses may be on their way
                    self._forward(self._tokens[1:, :2], states)
                for state in states:
                    state.rewind(sent)

    def _forward(self, tokens: mx.array, states: Sequence[ShardState]) -> mx.array:
        carry = None
        for shard, state in zip(self._shards, states, strict=True):
            carry = shard.forward(tokens, carry, state)
        assert isinstance(carry, mx.array)
        mx.eval(carry, *(state.arrays() for state in states))
        return carry

    def _compare(self, logits: mx.array, expected: mx.array) -> None:
        logits, expected = logits.astype(mx.float32), expected.astype(mx.float32)
        apart = mx.where(logits == expected, 0.0, mx.abs(logits - expected))
        self._worst = max(self._worst, _number(mx.nan_to_num(apart.max(), nan=mx.inf)))


def _number(scalar: mx.array) -> float:
    value: Any = scalar.item()
    return float(value)
