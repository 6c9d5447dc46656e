"""The one vector that a prompt becomes: its hidden states pooled as they come, part by part.

As sentence-transformers has it: the last token's state, the first one's, or the mean of all, all in float32,
and divided by its length where the model says so. Compute thread only.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from proto import ring_pb2

MIN_LENGTH = 1e-12  # a vector is divided by no less, as in torch.nn.functional.normalize


class PooledPrompt:
    """Of one prompt. After `add`, the caller evaluates `arrays()` before the next part comes."""

    def __init__(self, pooling: ring_pb2.Pooling) -> None:
        self._pooling = pooling
        self._state: mx.array | None = None  # (hidden_size,) float32: a sum, or one token's
        self._num_tokens = 0

    def add(self, hidden: mx.array) -> None:
        """The next tokens of the prompt: (T, hidden_size) of any float type, after the final norm."""
        kind, first = self._pooling.kind, self._state
        self._num_tokens += hidden.shape[0]
        if kind == ring_pb2.Pooling.MEAN:
            total = hidden.astype(mx.float32).sum(axis=0)
            self._state = total if first is None else first + total
        elif kind == ring_pb2.Pooling.LAST:
            self._state = _token(hidden, hidden.shape[0] - 1)
        elif first is None:
            self._state = _token(hidden, 0)

    def arrays(self) -> list[mx.array]:
        """What it has come to."""
        return [] if self._state is None else [self._state]

    def vector(self) -> mx.array:
        """(dimensions,) float32 of all that was added. Raises ValueError for more than there are."""
        assert self._state is not None
        num_dimensions = self._pooling.dimensions
        if num_dimensions > self._state.size:
            raise ValueError(f"the vectors have {self._state.size} dimensions, fewer than {num_dimensions}")
        out = self._state
        if self._pooling.kind == ring_pb2.Pooling.MEAN:
            out = out / self._num_tokens
        if num_dimensions:
            out = out[:num_dimensions]
        if self._pooling.is_normalised:
            out = out / mx.maximum(mx.sqrt((out * out).sum()), MIN_LENGTH)
        return out


def to_bytes(vector: mx.array) -> bytes:
    """An evaluated float32 array, little-endian. Raises ValueError where it holds what is no number."""
    numbers = np.array(vector).astype("<f4")
    if not np.isfinite(numbers).all():
        raise ValueError("the model's hidden states hold what is no number")
    return numbers.tobytes()


def _token(hidden: mx.array, index: int) -> mx.array:
    """A copy of one row: a slice would keep all of them."""
    return mx.take(hidden, mx.array(index), axis=0).astype(mx.float32)
