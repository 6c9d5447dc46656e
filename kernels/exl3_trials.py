"""What trials of an EXL3 matrix need: random calls as a model makes them, the reference's answers, its name.

For the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kernels import exl3_ops
from kernels.exl3 import Exl3Linear, Exl3SwitchLinear
from kernels.exl3_choice import Called, Way
from kernels.exl3_kernels import Matrix
from kernels.exl3_reference import BLOCK, TILE

NUM_ROWS = 256  # random ones, of which trials take theirs
FEW_EXPERTS = 16  # in a trial beside the reference
SORTED_PAIRS = 64  # of a token and an expert: from so many on mlx-lm sorts them by expert
REFERENCE_WEIGHTS = 1 << 22  # that the CPU decodes of a matrix

Exl3Layer = Exl3Linear | Exl3SwitchLinear
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a layer is called with; of each of the P rows of its answer the random row and the expert."""

    x: mx.array
    indices: mx.array | None
    rows: Numbers  # (P,)
    experts: Numbers  # (P,), 0 for a linear
    is_sorted: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """Answers to all random rows, of some experts and some columns.

    x: (NUM_ROWS, in); experts: (E',) in order; columns: (C,); wanted: (E', NUM_ROWS, C) float32.
    """

    x: mx.array
    experts: Numbers
    columns: mx.array
    wanted: mx.array

    def of(self, one: Rows) -> mx.array:
        """(P, C)."""
        with mx.stream(mx.cpu):
            return self.wanted[mx.array(np.searchsorted(self.experts, one.experts)), mx.array(one.rows)]


def reference_of(layer: Exl3Layer, called: Called) -> Reference:
    """By MLX's operations in float32 on the CPU, which decode to the bits of kernels.exl3_reference."""
    x = mx.random.normal((NUM_ROWS, layer.input_dims), key=mx.random.key(0)).astype(called.dtype)
    mx.eval(x)
    matrices, experts = [], np.zeros(1, np.int64)
    if isinstance(layer, Exl3Linear):
        matrices = [layer.matrix]
    else:
        few = min(layer.num_experts, max(FEW_EXPERTS, called.top_k))
        experts = np.unique(np.linspace(0, layer.num_experts - 1, few).round().astype(np.int64))
        matrices = [layer.expert(int(number)) for number in experts]
    blocks = _some_blocks(matrices[0])
    columns = np.concatenate([np.arange(BLOCK * block, BLOCK * (block + 1)) for block in blocks])
    with mx.stream(mx.cpu):  # a GPU may round products of float32 to less
        rows = x.astype(mx.float32)
        wanted = mx.stack([_answers(rows, matrix, blocks) for matrix in matrices])
        mx.eval(wanted)
    return Reference(x, experts, mx.array(columns[columns < layer.output_dims]), wanted)


def _some_blocks(matrix: Matrix) -> list[int]:
    """Blocks of 128 outputs over the whole width, the first and the last among them."""
    count = matrix.width // BLOCK
    few = min(count, max(2, REFERENCE_WEIGHTS // (matrix.height * BLOCK)))
    return sorted({round(at) for at in np.linspace(0, count - 1, few).tolist()})


def _answers(x: mx.array, matrix: Matrix, blocks: Sequence[int]) -> mx.array:
    """(rows, n) float32 to the columns of these blocks."""
    parts = []
    for block in blocks:
        own, tiles = slice(block * BLOCK, (block + 1) * BLOCK), BLOCK // TILE
        trellis = matrix.trellis[:, block * tiles : (block + 1) * tiles]
        bias = None if matrix.bias is None else matrix.bias[own]
        y = exl3_ops.linear(x, trellis, matrix.suh, matrix.svh[own], matrix.codebook, bias=bias)
        parts.append(y[:, : matrix.output_dims - own.start])
    return mx.concatenate(parts, axis=-1)


def draw(
    layer: Exl3Layer, called: Called, source: mx.array, num_tokens: int, *, seed: int, known: Numbers
) -> Rows:
    """Some rows of `source`, each token with different experts of `known`, as mlx-lm calls such a layer."""
    rng = np.random.default_rng(seed)
    if isinstance(layer, Exl3Linear):
        rows = rng.integers(0, len(source), num_tokens)
        return _evaluated(Rows(source[mx.array(rows)], None, rows, np.zeros_like(rows)))
    chosen = np.stack([rng.permutation(known)[: called.top_k] for _ in range(num_tokens)])
    rows = rng.integers(0, len(source), chosen.shape if called.has_own_rows else (num_tokens, 1))
    pairs, experts = np.broadcast_to(rows, chosen.shape).reshape(-1), chosen.reshape(-1)
    is_sorted = chosen.size >= SORTED_PAIRS
    if is_sorted:
        order = np.argsort(experts, kind="stable")
        rows = pairs = pairs[order]
        chosen = experts = experts[order]
    x, indices = source[mx.array(rows)][..., None, :], mx.array(chosen.astype(np.uint32))
    return _evaluated(Rows(x, indices, pairs, experts, is_sorted))


def _evaluated(one: Rows) -> Rows:
    mx.eval(one.x, *([] if one.indices is None else [one.indices]))
    return one


def product(layer: Exl3Layer, x: mx.array, one: Rows, way: Way) -> mx.array:
    """The layer's answer to x, called as `one` has it."""
    if isinstance(layer, Exl3Linear):
        return layer.product(x, way)
    assert one.indices is not None
    return layer.product(x, one.indices, way, one.is_sorted)


def describe(layer: Exl3Layer, called: Called) -> str:
    """A form of matrix in a line; different forms have different ones."""
    dtype = str(called.dtype).removeprefix("mlx.core.")
    bias = ", with bias" if "bias" in layer else ""
    sizes = f"{layer.input_dims} -> {layer.output_dims}"
    if isinstance(layer, Exl3Linear):
        return f"exl3 {sizes}, {layer.bits} bits {layer.codebook}{bias}, {dtype}"
    kinds = ", ".join(f"{bits} bits {codebook}" for bits, codebook in layer.kinds)
    own = ", a row for each" if called.has_own_rows else ""
    return f"exl3 {called.top_k} of {layer.num_experts} experts, {sizes}, {kinds}{bias}{own}, {dtype}"
