"""The cases of the EXL3 kernels: random streams, each of which is a valid tensor, beside MLX's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import mlx.core as mx

from kernels import exl3_ops
from kernels.exl3_kernels import Matrix, plan
from kernels.exl3_reference import BLOCK, CODEBOOKS, TILE, Codebook
from kernels.ladder.case import Case

Arrays = Sequence[mx.array]
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
# in, out, rows: unpadded, padded, and in parts with exl3_finish behind them
SMALL = ((128, 128, 1), (200, 300, 3), (1100, 136, 5), (1024, 128, 9))
# of Qwen3-30B-A3B, GLM-4.7-Flash and Llama-3.1-70B
FULL = ((2048, 4096, 1), (2048, 4096, 8), (8192, 28672, 1), (8192, 28672, 8), (2048, 151936, 1))
FULL_EXPERTS = ((2048, 768, 128, 8), (768, 2048, 128, 8), (2048, 1536, 64, 4))  # in, out, experts, of a token


def _size(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


def _tensors(lead: tuple[int, ...], num_in: int, num_out: int, bits: int) -> list[mx.array]:
    """trellis, suh, svh, bias of experts, or of a layer where `lead` is empty."""
    keys = mx.random.split(mx.random.key(bits), 4)
    height, width = _size(num_in), _size(num_out)
    words = mx.random.randint(0, 1 << 16, (*lead, height // TILE, width // TILE, TILE * bits), key=keys[0])
    return [
        words.astype(mx.uint16).view(mx.int16),
        mx.random.uniform(0.5, 1.5, (*lead, height), key=keys[1]).astype(mx.float16),
        (mx.random.normal((*lead, width), key=keys[2]) / num_in**0.5).astype(mx.float16),
        mx.random.normal((*lead, num_out), key=keys[3]).astype(mx.float16),
    ]


def _rows(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(prod(shape))).astype(dtype)


def _matrix(arrays: Arrays, codebook: Codebook) -> Matrix:
    trellis, suh, svh, bias = arrays
    return Matrix(trellis, suh, svh, bias, codebook, bias.shape[-1])


def _product(codebook: Codebook, x: mx.array, *arrays: mx.array) -> mx.array:
    return _matrix(arrays, codebook).product(x)


def _product_reference(codebook: Codebook, x: mx.array, *arrays: mx.array) -> mx.array:
    trellis, suh, svh, bias = arrays
    y = exl3_ops.linear(x.astype(mx.float32), trellis, suh, svh, codebook, bias=bias)
    return y[..., : bias.shape[-1]]


def _experts(codebook: Codebook, x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
    """x (tokens, in), indices (tokens, k): a row for each pair."""
    matrix, chosen = _matrix(arrays, codebook), indices.reshape(-1)
    if x.shape[0] == 1:
        return matrix.pairs(x, chosen)
    return matrix.tiles(x, chosen, plan(chosen, arrays[0].shape[0]))


def _experts_reference(codebook: Codebook, x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
    trellis, suh, svh, bias = arrays
    y = exl3_ops.switch(
        x.astype(mx.float32)[:, None, None],
        indices,
        [(trellis, codebook)],
        places=None,
        suh=suh,
        svh=svh,
        bias=bias,
    )
    return y.reshape(indices.size, -1)[:, : bias.shape[-1]]


def _unpack(codebook: Codebook, trellis: mx.array) -> mx.array:
    nothing = mx.zeros(8, mx.float16)
    return Matrix(trellis, nothing, nothing, None, codebook, 0).unpacked()


def _product_inputs(num_in: int, num_out: int, rows: int, bits: int, dtype: mx.Dtype) -> list[mx.array]:
    return [_rows((rows, num_in), dtype), *_tensors((), num_in, num_out, bits)]


def _expert_inputs(
    sizes: tuple[int, int, int, int], tokens: int, bits: int, dtype: mx.Dtype
) -> list[mx.array]:
    num_in, num_out, num_experts, top_k = sizes
    scores = mx.random.uniform(shape=(tokens, num_experts), key=mx.random.key(tokens))
    chosen = mx.argsort(scores, axis=-1)[:, :top_k].astype(mx.uint32)
    return [_rows((tokens, num_in), dtype), chosen, *_tensors((num_experts,), num_in, num_out, bits)]


def _case(
    name: str, inputs: Callable[[], Arrays], functions: tuple[Callable[..., mx.array], ...], **more: object
) -> Case:
    run, reference = functions
    return Case(name=name, inputs=inputs, run=run, reference=reference, **more)  # type: ignore[arg-type]


def exl3_cases() -> list[Case]:
    """Decoding, bit for bit, in all widths and codebooks; products of few rows; experts for few tokens."""
    cases = [
        _case(
            f"exl3_unpack/{bits}bit-{codebook}",
            partial(lambda bits: _tensors((2,), 128, 256, bits)[:1], bits),
            (
                partial(_unpack, codebook),
                partial(lambda book, trellis: exl3_ops.decode(trellis, book), codebook),
            ),
            tolerance=0.0,
            is_exact=True,
            is_golden=(bits, codebook) == (3, "mcg"),
            is_long=(bits, codebook) not in {(1, "3inst"), (3, "mcg"), (4, "mcg"), (8, "mul1")},
        )
        for bits in range(1, 9)
        for codebook in CODEBOOKS
    ]
    kinds = [(bits, CODEBOOKS[bits % 3]) for bits in range(1, 9)]
    for bits, codebook in kinds:
        both = partial(_product, codebook), partial(_product_reference, codebook)
        for num_in, num_out, rows in (*SMALL, *(FULL if bits in {2, 3, 4, 6} else ())):
            is_full = (num_in, num_out, rows) in FULL
            for dtype, tolerance in TOLERANCE.items():
                if is_full and dtype != mx.float16:
                    continue
                cases.append(
                    _case(
                        f"exl3_decode/{rows}x{num_in}-{num_out}-{bits}bit-{codebook}-{NAMES[dtype]}",
                        partial(_product_inputs, num_in, num_out, rows, bits, dtype),
                        both,
                        tolerance=tolerance,
                        is_golden=bits == 3 and rows in {1, 5} and dtype == mx.float16 and not is_full,
                        is_full=is_full,
                        is_long=not (bits == 3 and rows in {1, 3} and dtype == mx.float16),
                    )
                )
        experts = partial(_experts, codebook), partial(_experts_reference, codebook)
        for sizes in ((200, 136, 6, 3), *(FULL_EXPERTS if bits in {2, 3, 4} else ())):
            is_full = sizes in FULL_EXPERTS
            cases += [
                _case(
                    f"exl3_decode/{tokens}-tokens-{sizes[2]}x{sizes[0]}-{sizes[1]}-{bits}bit-{codebook}",
                    partial(_expert_inputs, sizes, tokens, bits, mx.float16),
                    experts,
                    tolerance=TOLERANCE[mx.float16],
                    is_golden=bits == 3 and not is_full,
                    is_full=is_full,
                    is_long=not (bits == 3 and tokens == 1),
                )
                for tokens in ((1, 5) if not is_full else (1, 8, 32))
            ]
    return cases
