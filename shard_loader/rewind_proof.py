"""Whether an architecture's sequences can go back after a wrong guess, tried on a tiny model of its config.

Guessed tokens are read several in a pass; where they were wrong, each stage goes back as far as it can
(`Reach`), what was right is read again if need be, and the sequence goes on token by token and in further
guesses. Each logit of a right token is held against the same sequence read token by token in the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shard_loader.reach import Reach
from shard_loader.rehearsal import UNSUITABLE, Rehearsal
from shard_loader.trial import Trial, number

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


class _Trial(Trial):
    def __init__(self, rehearsal: Rehearsal, boundaries: Sequence[int]) -> None:
        super().__init__(rehearsal, boundaries)
        self._reach = min(shard.reach for shard in self._shards)
        windows = [shard.trim_window or 0 for shard in self._shards]
        self._trim_window = min(windows)
        length = max(PROMPTS) + sum(right for right, _ in PASSES)
        self._tokens = rehearsal.tokens(2, length)  # (2, T): the first row is right, the second is wrong

    def run(self) -> float | None:
        if self._reach == Reach.NONE:
            return None
        largest = 0.0
        for num_prompt in PROMPTS:
            expected = self._lone(self._tokens[:1], num_prompt)
            largest = max(largest, number(mx.abs(expected).max()))
            self._guess(num_prompt, expected)
        return self._worst / largest

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
