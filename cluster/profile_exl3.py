"""EXL3 matrices to be timed as other formats' weights are, in the way that a node would compute them. MLX.

For the thread that owns MLX. A kernel counts where the self-test's first half finds it right here; else, and
where no GPU runs kernels, MLX's operations do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from kernels import backend
from kernels.exl3 import Exl3Linear
from kernels.exl3_choice import Called, Way
from kernels.exl3_reference import BLOCK, TILE, Codebook
from kernels.exl3_subject import Exl3Subject, stored_bytes
from kernels.exl3_trials import describe
from kernels.random_matrix import random_matrix
from kernels.self_test import try_size

CODEBOOK: Codebook = "mcg"  # that of nearly all published checkpoints
CALLED = Called(mx.float16)


@dataclass(frozen=True, slots=True)
class Exl3Weights:
    """A linear in EXL3, as cluster.profile_products.Weights are; num_out is a multiple of 128."""

    format: str
    layer: Exl3Linear
    ways: Mapping[int, Way]  # by rows; others by MLX's operations

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.layer)

    @property
    def num_out(self) -> int:
        return self.layer.output_dims

    @property
    def dtype(self) -> mx.Dtype:
        """Of the other operand."""
        return CALLED.dtype

    def times(self, x: mx.array) -> mx.array:
        """x (rows, in) -> (rows, num_out)."""
        return self.layer.product(x, self.ways.get(len(x), "operations"))

    def repeated(self, num_times: int) -> Exl3Weights:
        own = self.layer
        trellis, svh = (
            mx.concatenate([a] * num_times, axis=at) for a, at in ((own.trellis, 1), (own.svh, 0))
        )
        return self._with(trellis, svh)

    def first(self, num_out: int) -> Exl3Weights:
        """Whole blocks, at least one."""
        width = min(self.num_out, -(-num_out // BLOCK) * BLOCK)
        return self._with(self.layer.trellis[:, : width // TILE], self.layer.svh[:width])

    def _with(self, trellis: mx.array, svh: mx.array) -> Exl3Weights:
        made = Exl3Linear(self.layer.input_dims, int(svh.size), self.layer.bits, self.layer.codebook)
        # An array of its own: a slice would keep, and a cache might hold, all that it was cut from.
        made.trellis, made.svh, made.suh = mx.contiguous(trellis), mx.contiguous(svh), self.layer.suh
        mx.eval(made.parameters())
        return Exl3Weights(self.format, made, self.ways)


def make_exl3(name: str, width: int, rows: tuple[int, ...]) -> Exl3Weights:
    """The smallest, "exl3/3" in 3 bits; rows: how many it will be called with.

    Raises ValueError for other bits than 1 to 8.
    """
    bits = int(name.removeprefix("exl3/"))
    if not 1 <= bits <= 8:
        raise ValueError(f"EXL3 has 1 to 8 bits, not {bits}")
    layer = random_matrix((width, BLOCK), [(bits, CODEBOOK)], CALLED)
    assert isinstance(layer, Exl3Linear)
    return Exl3Weights(name, layer, _ways(layer, rows))


def _ways(layer: Exl3Linear, rows: tuple[int, ...]) -> dict[int, Way]:
    """Of the kernels, where they run on a GPU and are right."""
    if backend.current() in (None, "emulated"):
        return {}
    subject = Exl3Subject(describe(layer, CALLED), [layer], CALLED)
    return {num: subject.way(num) for num in rows if not try_size(subject, num, is_timed=False).failure}
