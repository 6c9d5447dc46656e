"""Sequences of a tiny model, held against the same read token by token in the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from shard_loader.batch_state import BatchState
from shard_loader.rehearsal import Rehearsal
from shard_loader.state import ShardState

State = ShardState | BatchState


class Trial:
    """The stages of a cut model, and the worst that was found of their logits."""

    def __init__(self, rehearsal: Rehearsal, boundaries: Sequence[int]) -> None:
        self._model = rehearsal.model
        self._shards = rehearsal.shards(boundaries)
        self._worst = 0.0  # difference of a logit; infinite for NaN

    def _lone(self, tokens: mx.array, num_prompt: int) -> mx.array:
        """What the whole model says after each of `tokens` (1, T) behind the prompt, (T - P, vocab)."""
        cache = make_prompt_cache(self._model)
        self._model(tokens[:, :num_prompt], cache=cache)
        steps = range(num_prompt, tokens.shape[1])
        logits = [self._model(tokens[:, t : t + 1], cache=cache)[0, -1] for t in steps]
        return mx.stack(logits).astype(mx.float32)

    def _forward(self, tokens: mx.array, states: Sequence[State]) -> mx.array:
        """The logits of `tokens` (B, T), through all stages."""
        carry = None
        for shard, state in zip(self._shards, states, strict=True):
            carry = shard.forward(tokens, carry, state)
        assert isinstance(carry, mx.array)
        mx.eval(carry, *(state.arrays() for state in states))
        return carry

    def _compare(self, logits: mx.array, expected: mx.array) -> None:
        """Note the largest difference; equal infinities (masked tokens) are equal."""
        logits = logits.astype(mx.float32)
        apart = mx.where(logits == expected, 0.0, mx.abs(logits - expected))
        self._worst = max(self._worst, number(mx.nan_to_num(apart.max(), nan=mx.inf)))


def number(scalar: mx.array) -> float:
    """The value of a 0-dim array."""
    value: Any = scalar.item()
    return float(value)
