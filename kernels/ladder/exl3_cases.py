"""EXL3 layers on the ladder: all bits, all codebooks, one row and a few, experts, decoding alone."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kernels import exl3_ops, exl3_reference
from kernels.exl3_kernels import Matrix, plan
from kernels.exl3_reference import CODEBOOKS, TILE, Codebook
from kernels.ladder.case import Case, dtype_name

# Of real models: inputs and outputs; experts, those of a token, inputs and outputs of one.
FULL = (("4096x4096", 4096, 4096), ("llama-70b-up", 8192, 28672), ("qwen3-head", 2048, 151936))
FULL_EXPERTS = (("qwen3-30b-up", 128, 8, 2048, 768), ("qwen3-30b-down", 128, 8, 768, 2048))
TOLERANCES = {mx.float16: 1e-3, mx.bfloat16: 8e-3}


@dataclass(frozen=True, slots=True)
class _Layer:
    """A random stream is a valid weight. Arrays: x, indices, trellis, suh, svh, bias."""

    bits: int
    codebook: Codebook
    num_rows: int
    num_experts: int = 0  # none: one weight for all rows
    top_k: int = 1
    height: int = 256
    width: int = 128
    output_dims: int = 120
    dtype: mx.Dtype = mx.float16

    def arrays(self) -> list[mx.array]:
        rng = np.random.default_rng(self.bits)
        lead = (self.num_experts,) if self.num_experts else ()
        words = (*lead, self.height // TILE, self.width // TILE, TILE * self.bits)
        x = rng.standard_normal((self.num_rows, self.height - 8))
        indices = rng.integers(0, max(1, self.num_experts), max(8, self.num_rows * self.top_k))
        return [
            mx.array(x.astype(np.float32)).astype(self.dtype),
            mx.array(indices.astype(np.uint32)),
            mx.array(rng.integers(-(1 << 15), 1 << 15, words, np.int16)),
            mx.array(rng.standard_normal((*lead, self.height)).astype(np.float16)),
            mx.array(rng.standard_normal((*lead, self.width)).astype(np.float16)),
            mx.array(rng.standard_normal((*lead, self.output_dims)).astype(np.float16)),
        ]

    def _matrix(self, arrays: tuple[mx.array, ...]) -> Matrix:
        trellis, suh, svh, bias = arrays
        return Matrix(trellis, suh, svh, bias, self.codebook, self.output_dims)

    def run(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        matrix = self._matrix(rest)
        if not self.num_experts:
            return matrix.product(x)
        chosen = indices[: self.num_rows * self.top_k]
        if self.num_rows == 1:
            return matrix.pairs(x, chosen)
        return matrix.tiles(x, chosen, plan(chosen, self.num_experts))

    def unpacked(self, _x: mx.array, _indices: mx.array, *rest: mx.array) -> mx.array:
        return self._matrix(rest).unpacked()

    def decoded(self, _x: mx.array, _indices: mx.array, trellis: mx.array, *_rest: mx.array) -> mx.array:
        return mx.array(exl3_reference.decode(np.array(trellis), self.codebook))

    def reference(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        trellis, suh, svh, bias = (np.array(array) for array in rest)
        rows = np.array(x.astype(mx.float32), np.float64)
        if not self.num_experts:
            weight = exl3_reference.dense(trellis, suh, svh, self.codebook)
            return self._answer(rows, weight, bias)
        answers = []
        for number, expert in enumerate(np.array(indices)[: self.num_rows * self.top_k]):
            weight = exl3_reference.dense(trellis[expert], suh[expert], svh[expert], self.codebook)
            answers.append(self._answer(rows[number // self.top_k][None], weight, bias[expert]))
        return mx.concatenate(answers)

    def by_operations(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        """As `reference`, for sizes that would take the first principles minutes."""
        trellis, suh, svh, bias = rest
        rows = x.astype(mx.float32)
        if not self.num_experts:
            return exl3_ops.linear(rows, trellis, suh, svh, self.codebook, bias=bias)[:, : self.output_dims]
        chosen = indices[: self.num_rows * self.top_k].reshape(self.num_rows, self.top_k)
        parts = [(trellis, self.codebook)]
        made = exl3_ops.switch(rows[:, None, None], chosen, parts, places=None, suh=suh, svh=svh, bias=bias)
        return made.reshape(chosen.size, -1)[:, : self.output_dims]

    def _answer(self, rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> mx.array:
        inner = weight[: self.output_dims, : rows.shape[1]]
        return mx.array((rows @ inner.T + bias.astype(np.float64)).astype(np.float32))


def _case(
    name: str, layer: _Layer, *, is_golden: bool = False, is_full: bool = False, is_long: bool = True
) -> Case:
    return Case(
        name=f"exl3/{name}-{layer.bits}-{layer.codebook}-{dtype_name(layer.dtype)}-{layer.num_rows}",
        inputs=layer.arrays,
        run=layer.run,
        reference=layer.by_operations if is_full else layer.reference,
        tolerance=TOLERANCES[layer.dtype],
        is_golden=is_golden,
        is_full=is_full,
        is_long=is_long,
    )


def exl3_cases() -> list[Case]:
    cases = []
    for number, bits in enumerate(range(1, 9)):
        codebook = CODEBOOKS[number % 3]
        dtype = mx.float16 if number % 2 else mx.bfloat16
        is_first = bits == 3
        cases += [
            _case("linear", _Layer(bits, codebook, 1, dtype=dtype), is_golden=is_first, is_long=not is_first),
            _case("linear", _Layer(bits, codebook, 5, dtype=dtype)),
        ]
    for codebook in CODEBOOKS:
        for bits in range(1, 9):
            layer = _Layer(bits, codebook, 1)
            cases.append(
                Case(
                    name=f"exl3/unpack-{bits}-{codebook}",
                    inputs=layer.arrays,
                    run=layer.unpacked,
                    reference=layer.decoded,
                    tolerance=0.0,
                    is_exact=True,
                    is_golden=(bits, codebook) == (3, CODEBOOKS[0]),
                    is_long=(bits, codebook) != (3, CODEBOOKS[0]),
                )
            )
    wide = _Layer(3, "mcg", 1, height=1024)
    cases += [
        _case("split", wide, is_golden=True),
        _case("experts", _Layer(3, "mcg", 1, num_experts=6, top_k=4), is_golden=True),
        _case("experts", _Layer(4, "mul1", 6, num_experts=5, top_k=3), is_golden=True),
    ]
    for bits in (2, 3, 4, 6):
        for rows in (1, 8):
            for name, height, width in FULL:
                layer = _Layer(bits, "mcg", rows, height=height, width=width, output_dims=width)
                cases.append(_case(name, layer, is_full=True))
            for name, num_experts, top_k, height, width in FULL_EXPERTS:
                layer = _Layer(bits, "mcg", rows, num_experts, top_k, height, width, output_dims=width)
                cases.append(_case(name, layer, is_full=True))
    return cases
