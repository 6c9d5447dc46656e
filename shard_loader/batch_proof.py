"""What may be done with sequences of an architecture, tried on a tiny model of its config.

Whether several may share a forward pass: sequences of different lengths are read alone, merged, stepped
together, one leaves and another joins, one is taken out again (read together: read_proof.py). And whether one
may begin as a copy of another, which must not feel what is written to the original after it was made, nor the
other way round.

Each step's logits are held against the same sequence run alone through the whole model. The numbers may
differ by rounding, as any two batch sizes do in mlx-lm itself, but not by more.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shard_loader.cut_proof import RowProof
from shard_loader.read_proof import read_error
from shard_loader.rehearsal import UNSUITABLE, Rehearsal
from shard_loader.rewind_proof import rewind_error
from shard_loader.state import ShardState
from shard_loader.trial import State, Trial, number

PROMPTS = (12, 3, 7)  # tokens; the first is longer than every window of the tiny model
NUM_STEPS = 4
TOLERANCE = 1e-3  # of the largest logit


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
    batched, forked, rewound, read = (
        error is not None and error <= TOLERANCE
        for error in (
            batch_error(rehearsal),
            fork_error(rehearsal),
            rewind_error(rehearsal),
            read_error(rehearsal),
        )
    )
    return RowProof(batched=batched, forked=forked, rewound=rewound, read_together=batched and read)


class _Trial(Trial):
    def __init__(self, rehearsal: Rehearsal, boundaries: Sequence[int]) -> None:
        super().__init__(rehearsal, boundaries)
        self._tokens = rehearsal.tokens(len(PROMPTS), max(PROMPTS) + 2 * NUM_STEPS + 1)  # (3, T)
        self._at = list(PROMPTS)

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
        return self._worst / max(number(mx.abs(logits).max()) for logits in expected)

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
        return self._worst / number(mx.abs(expected[0]).max())

    def _copies(self, states: Sequence[ShardState], num_dropped: int) -> list[ShardState]:
        return [
            shard.fork(state, state.position - num_dropped)
            for shard, state in zip(self._shards, states, strict=True)
        ]

    def _alone(self, row: int) -> mx.array:
        """What the whole model says after each token behind the prompt, (steps, vocab)."""
        return self._lone(self._tokens[row : row + 1, : PROMPTS[row] + 2 * NUM_STEPS + 1], PROMPTS[row])

    def _read(self, row: int) -> list[ShardState]:
        states = [shard.new_state() for shard in self._shards]
        self._forward(self._tokens[row : row + 1, : PROMPTS[row]], states)
        return states

    def _step(self, states: Sequence[State], rows: Sequence[int], expected: Sequence[mx.array]) -> None:
        for _ in range(NUM_STEPS if len(rows) > 1 else 1):
            tokens = mx.stack([self._tokens[row, self._at[row]] for row in rows])[:, None]
            logits = self._forward(tokens, states)[:, -1]
            for i, row in enumerate(rows):
                self._compare(logits[i], expected[row][self._at[row] - PROMPTS[row]])
                self._at[row] += 1
