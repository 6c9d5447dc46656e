"""What requests change in the scores before tokens are drawn: of all rows of a batch in one operation each.

Collected row by row, made once, in mlx-lm's order: bias, penalties, bans, and last what a grammar forbids.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]
Floats = NDArray[np.float32]


class ScoreEdits:
    """Of scores (B, vocab_size). The ids of a call differ from each other, and are below vocab_size."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._biases: list[tuple[Ids, Floats]] = []
        self._repetitions: list[tuple[Ids, Floats]] = []
        self._penalties: list[tuple[Ids, Floats]] = []
        self._bans: list[tuple[Ids, Floats]] = []
        self._allowed: dict[int, NDArray[np.bool_]] = {}

    def add(self, row: int, ids: Ids, biases: Floats) -> None:
        """To the logits themselves."""
        self._biases.append(self._placed(row, ids, biases))

    def penalise_repetition(self, row: int, seen: Collection[int], penalty: float) -> None:
        """Divides what was seen by the penalty, or multiplies where negative (https://arxiv.org/abs/1909.05858)."""
        self._repetitions.append(self._placed(row, _ids(seen), penalty))

    def subtract(self, row: int, ids: Collection[int], penalties: Collection[float]) -> None:
        """Of what the answer has already."""
        values = np.fromiter(penalties, np.float32, len(penalties))
        self._penalties.append(self._placed(row, _ids(ids), values))

    def ban(self, row: int, ids: Ids) -> None:
        """None of these may come."""
        self._bans.append(self._placed(row, ids, -math.inf))

    def allow_only(self, row: int, allowed: NDArray[np.bool_]) -> None:
        """allowed: (vocab_size,)."""
        self._allowed[row] = allowed

    def made(self, scores: mx.array) -> mx.array:
        """The scores with all of it; (B, vocab_size) float32 in and out."""
        if self._biases or self._repetitions or self._penalties or self._bans:
            scores = self._edited(scores.reshape(-1)).reshape(scores.shape)
        if self._allowed:
            allowed = np.ones(scores.shape, dtype=np.bool_)
            for row, mask in self._allowed.items():
                allowed[row] = mask
            scores = mx.where(mx.array(allowed), scores, -math.inf)
        return scores

    def _edited(self, flat: mx.array) -> mx.array:
        """Of the rows end to end, (B x vocab_size,): all but what a grammar forbids."""
        if self._biases:
            ids, values = _joined(self._biases)
            flat = flat.at[ids].add(values)
        if self._repetitions:
            ids, values = _joined(self._repetitions)
            chosen = flat[ids]
            penalised = mx.where(chosen < 0, chosen * values, chosen / values)
            flat = mx.put_along_axis(flat, ids, penalised, axis=0)
        if self._penalties:
            ids, values = _joined(self._penalties)
            flat = flat.at[ids].subtract(values)
        if self._bans:
            flat = mx.put_along_axis(flat, *_joined(self._bans), axis=0)
        return flat

    def _placed(self, row: int, ids: Ids, values: Floats | float) -> tuple[Ids, Floats]:
        """Where they are when all rows lie end to end."""
        return ids + np.uint32(row * self._vocab_size), np.broadcast_to(np.float32(values), ids.shape)


def _ids(tokens: Collection[int]) -> Ids:
    return np.fromiter(tokens, np.uint32, len(tokens))


def _joined(pieces: list[tuple[Ids, Floats]]) -> tuple[mx.array, mx.array]:
    ids, values = zip(*pieces, strict=True)
    return mx.array(np.concatenate(ids)), mx.array(np.concatenate(values))
