"""What may be done with sequences of an architecture, tried on a tiny model of its config.

Whether several may share a forward pass: sequences of different lengths are read alone, merged, stepped
together, one leaves and another joins, one is taken out again. And whether one may begin as a copy of
another, which must not feel what is written to the original after it was made, nor the other way round.

Each step's logits are held against the same sequence run alone through the whole model. The numbers may
differ by rounding, as any two batch sizes do in mlx-lm itself, but not by more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from shard_loader.batch_state import BatchState
from shard_loader.cut_proof import RowProof
from shard_loader.rehearsal import UNSUITABLE, Rehearsal
from shard_loader.rewind_proof import rewind_error
from shard_loader.state import ShardState

PROMPTS = (12, 3, 7)  # tokens; the first is longer than every window of the tiny model
NUM_STEPS = 4
TOLERANCE = 1e-3  # of the largest logit

State = ShardState | BatchState


def batch_error(rehearsal: Rehearsal, boundaries: Sequence[int] = ()) -> float | None:
    """The largest difference of a batched row's logits, as a share of the largest logit.

    boundaries: the model is cut before these layers. None: no batched form, or it fails.
    """
    try:
        return _Trial(rehearsal, boundaries).run()
    except UNSUITABLE:
        return None


def fork_error(rehearsal: Rehearsal, boundaries: Sequence[int] = ()) -> float | None:
    """As `batch_error`, of a sequence that begins as a copy of another, and of that other one afterwards."""
    try:
        return _Trial(rehearsal, boundaries).run_forks()
    except UNSUITABLE:
        return None


def prove_rows(rehearsal: Rehearsal) -> RowProof:
    """What may be done with the whole model's sequences."""
    errors = batch_error(rehearsal), fork_error(rehearsal), rewind_error(rehearsal)
    return RowProof(*(error is not None and error <= TOLERANCE for error in errors))


class _Trial:
    def __init__(self, rehearsal: Rehearsal, boundaries: Sequence[int]) -> None:
        self._rehearsal = rehearsal
        self._shards = rehearsal.shards(boundaries)
        self._tokens = rehearsal.tokens(len(PROMPTS), max(PROMPTS) + 2 * NUM_STEPS + 1)  # (3, T)
        self._at = list(PROMPTS)
        self._worst = 0.0

    def run(self) -> float | None:
        if not all(shard.is_batchable for shard in self._shards):
            return None
        expected = [self._alone(row) for row in range(len(PROMPTS))]
        lone = [self._read(row) for row in range(len(PROMPTS))]
        batch = [shard.merge([a, b]) for shard, a, b in zip(self._shards, *lone[:2], strict=True)]
        self._step(batch, [0, 1], expected)
        for shard, state, third in zip(self._shards, batch, lone[2], strict=True):
            state.keep([1])
            state.extend(shard.merge([third]))
        self._step(batch, [1, 2], expected)
        out = [shard.split(state, 0) for shard, state in zip(self._shards, batch, strict=True)]
        self._step(out, [1], expected)
        return self._worst / max(_number(mx.abs(logits).max()) for logits in expected)

    def run_forks(self) -> float | None:
        windows = [shard.trim_window for shard in self._shards]
        known = [window for window in windows if window is not None]
        if len(known) < len(windows):
            return None
        expected = [self._alone(0)]
        states = self._read(0)
        self._step(states, [0], expected)
        whole = self._copies(states, 0)
        if PROMPTS[0] + 1 < min(known):  # with fewer of its tokens: they are read again from there
            shorter = self._copies(states, 2)
            self._at[0] -= 2
            self._forward(self._tokens[:1, self._at[0] : self._at[0] + 1], shorter)
            self._at[0] += 1
            self._step(shorter, [0], expected)
        at = self._at[0]
        several = self._copies(states, 0)
        self._step(states, [0], expected)
        self._at[0] = at  # the copies write what the original has written
        self._step(whole, [0], expected)
        self._forward(self._tokens[:1, at : at + 2], several)  # a chunk, as the rest of a prompt is read
        self._at[0] = at + 2
        self._step(several, [0], expected)
        self._at[0] = at + 1
        self._step(states, [0], expected)
        return self._worst / _number(mx.abs(expected[0]).max())

    def _copies(self, states: Sequence[ShardState], num_dropped: int) -> list[ShardState]:
        return [
            shard.fork(state, state.position - num_dropped)
            for shard, state in zip(self._shards, states, strict=True)
        ]

    def _alone(self, row: int) -> mx.array:
        """What the whole model says after each token from the prompt's last on, (steps, vocab)."""
        model = self._rehearsal.model
        cache = make_prompt_cache(model)
        tokens = self._tokens[row : row + 1]
        model(tokens[:, : PROMPTS[row]], cache=cache)
        steps = [model(tokens[:, t : t + 1], cache=cache)[0, -1] for t in self._range(row)]
        return mx.stack(steps).astype(mx.float32)

    def _range(self, row: int) -> range:
        return range(PROMPTS[row], PROMPTS[row] + 2 * NUM_STEPS + 1)

    def _read(self, row: int) -> list[ShardState]:
        states = [shard.new_state() for shard in self._shards]
        self._forward(self._tokens[row : row + 1, : PROMPTS[row]], states)
        return states

    def _forward(self, tokens: mx.array, states: Sequence[State]) -> mx.array:
        carry = None
        for shard, state in zip(self._shards, states, strict=True):
            carry = shard.forward(tokens, carry, state)
        assert isinstance(carry, mx.array)
        mx.eval(carry, *(state.arrays() for state in states))
        return carry

    def _step(self, states: Sequence[State], rows: Sequence[int], expected: Sequence[mx.array]) -> None:
        for _ in range(NUM_STEPS if len(rows) > 1 else 1):
            tokens = mx.stack([self._tokens[row, self._at[row]] for row in rows])[:, None]
            logits = self._forward(tokens, states)[:, -1].astype(mx.float32)
            for i, row in enumerate(rows):
                apart = mx.abs(logits[i] - expected[row][self._at[row] - PROMPTS[row]])
                apart = mx.where(logits[i] == expected[row][self._at[row] - PROMPTS[row]], 0.0, apart)
                self._worst = max(self._worst, _number(mx.nan_to_num(apart.max(), nan=mx.inf)))
                self._at[row] += 1


def _number(scalar: mx.array) -> float:
    value: Any = scalar.item()
    return float(value)
