"""How an EXL3 layer makes its products, and who decides it: by the number of its rows.

For the thread that owns MLX; counters may be read by others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
from mlx import nn

from kernels import failure

logger = logging.getLogger(__name__)

# How a product is made: by MLX's operations, by a kernel that decodes where it multiplies, or by one that
# decodes to float16, with which MLX multiplies; "zeros": not at all, its shape is enough.
Way = Literal["operations", "in place", "unpacked", "zeros"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a layer does with a number of rows (of experts: of tokens): the way of the first span that has it.

    A span is the first and the last number, 0 for no end. In no span: MLX's operations.
    """

    spans: tuple[tuple[int, int, Way], ...] = ()

    def way(self, num_rows: int) -> Way:
        for first, last, way in self.spans:
            if first <= num_rows and (num_rows <= last or not last):
                return way
        return "operations"


OPERATIONS = Choice()
_ZEROS = Choice(((1, 0, "zeros"),))


@dataclass(frozen=True, slots=True)
class Called:
    """How a model calls a layer. dtype: of its rows; top_k: experts of a token, 1 for a linear."""

    dtype: mx.Dtype
    top_k: int = 1
    has_own_rows: bool = False  # a row for each expert of a token, not one for all


class ChoosingLayer(nn.Module):  # type: ignore[misc]
    """What linears and experts share: who decides, how often the kernels were used, and why no longer."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = OPERATIONS
        self.called: Called | None = None  # of the first call
        self.num_calls = 0  # of the kernels
        self.failure = ""  # why the kernels are no longer used here

    def give_up(self, error: Exception) -> None:
        """From now on MLX's operations."""
        self.choice, self.failure = OPERATIONS, failure.line(error)
        logger.warning("an EXL3 layer goes back to MLX's operations: %s", self.failure)

    def _chosen(self, num_rows: int, product: Callable[[Way], mx.array]) -> mx.array:
        way = self.choice.way(num_rows)
        if way in {"operations", "zeros"}:
            return product(way)
        try:
            y = product(way)
        except Exception as error:  # border: whatever a kernel raises, the answer is MLX's
            self.give_up(error)
            return product("operations")
        self.num_calls += 1
        return y


@contextlib.contextmanager
def learning(layers: Iterable[ChoosingLayer]) -> Iterator[None]:
    """Inside, a pass of the model that is not evaluated tells the layers how it calls them, and is small."""
    layers = list(layers)
    for layer in layers:
        layer.choice = _ZEROS
    try:
        yield
    finally:
        for layer in layers:
            layer.choice = OPERATIONS
