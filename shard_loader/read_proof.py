"""Whether prompts of an architecture can be read together, tried on a tiny model of its config.

Several sequences read the same number of tokens in a pass, as often as it takes: from nothing, over a
window's edge, from different positions, behind a single token, and after one of them was taken out. Each
row's logits are held against the same sequence read token by token alone in the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shard_loader.batch_state import BatchState
from shard_loader.rehearsal import UNSUITABLE, Rehearsal
from shard_loader.trial import State, Trial, number

NUM_ROWS = 4
FROM_NOTHING = (4, 7, 3)  # tokens of one pass after another, which are more than the tiny model's windows
HEAD_START = 3  # tokens that a third row has read when it joins; a fourth has read none
TOGETHER = (2, 1, 3, 1, 1, 2)
APART = (3, 1)
NUM_TOKENS = sum(FROM_NOTHING) + sum(TOGETHER) + sum(APART)


def read_error(rehearsal: Rehearsal, boundaries: Sequence[int] = ()) -> float | None:
    """The largest difference of a row's logits, as a share of the largest logit; cut at `boundaries`.

    None: no batched form, or it fails.
    """
    try:
        return _Trial(rehearsal, boundaries).run()
    except UNSUITABLE:
        return None


class _Trial(Trial):
    def __init__(self, rehearsal: Rehearsal, boundaries: Sequence[int]) -> None:
        super().__init__(rehearsal, boundaries)
        self._tokens = rehearsal.tokens(NUM_ROWS, NUM_TOKENS)  # (4, T)
        self._at = [0] * NUM_ROWS

    def run(self) -> float | None:
        if not all(shard.is_batchable for shard in self._shards):
            return None
        self._expected = [self._lone(self._tokens[row : row + 1], 1) for row in range(NUM_ROWS)]
        batch = self._new([0, 1])
        for num_tokens in FROM_NOTHING:
            self._read(batch, [0, 1], num_tokens)
        third = [shard.new_state() for shard in self._shards]
        self._read(third, [2], HEAD_START)
        for shard, rows, joins in zip(self._shards, batch, third, strict=True):
            rows.extend(shard.merge([joins, shard.new_state()]))
        for num_tokens in TOGETHER:
            self._read(batch, [0, 1, 2, 3], num_tokens)
        alone = [shard.split(rows, 2) for shard, rows in zip(self._shards, batch, strict=True)]
        for rows in batch:
            rows.keep([0, 1, 3])
        for num_tokens in APART:
            self._read(alone, [2], num_tokens)
            self._read(batch, [0, 1, 3], num_tokens)
        return self._worst / max(number(mx.abs(logits).max()) for logits in self._expected)

    def _new(self, rows: Sequence[int]) -> list[BatchState]:
        return [shard.merge([shard.new_state() for _ in rows]) for shard in self._shards]

    def _read(self, states: Sequence[State], rows: Sequence[int], num_tokens: int) -> None:
        """So many further tokens of each of `rows`."""
        spans = [slice(self._at[row], self._at[row] + num_tokens) for row in rows]
        tokens = mx.stack([self._tokens[row, span] for row, span in zip(rows, spans, strict=True)])
        logits = self._forward(tokens, states)  # (B, T, vocab)
        for i, row in enumerate(rows):
            known = max(1, self._at[row])  # what follows the first token of all is not known
            self._at[row] += num_tokens
            self._compare(
                logits[i, known - spans[i].start :], self._expected[row][known - 1 : self._at[row] - 1]
            )
