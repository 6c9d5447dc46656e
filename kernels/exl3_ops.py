"""EXL3 (trellis) products in MLX's own operations: what runs where no kernel does, on any device.

A state is looked up in a table of all 65536 values of its codebook, so a decoded weight has the bits of
`kernels.exl3_reference`. Nothing decoded is kept: each call decodes a block of columns, multiplies with it and
lets it go before the next, so that beside the tensors no more than BLOCK_WEIGHTS decoded weights are in
memory. For the thread that owns MLX; evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kernels import exl3_reference as reference
from kernels.exl3_reference import BLOCK, TILE, TILE_WEIGHTS, Codebook, bits_of

BLOCK_WEIGHTS = 1 << 21  # that are decoded at once
WEIGHT_BYTES = 16  # that each of them takes on its way: index, word, state, and the number twice


@lru_cache
def _table(codebook: Codebook) -> mx.array:
    return mx.array(reference.table(codebook))


@lru_cache
def _places(bits: int) -> tuple[mx.array, mx.array]:
    """(256,) for each weight of a tile, row by row: its first word in the stream, and how far to shift it
    and the word behind it to the right."""
    starts = ((np.arange(TILE_WEIGHTS) + 1) * bits - reference.STATE_BITS) % (TILE_WEIGHTS * bits)
    by_row = np.empty(TILE_WEIGHTS, np.uint32)
    by_row[reference.positions()] = starts
    return mx.array(by_row // 16), mx.array(16 - by_row % 16)


@lru_cache
def _order(bits: int) -> tuple[mx.array, mx.array]:
    """(16 K,) where each 16-bit word of the stream is stored, and the one that follows it."""
    words = np.arange(16 * bits)
    return mx.array(words ^ 1), mx.array(np.roll(words, -1) ^ 1)


def decode(trellis: mx.array, codebook: Codebook) -> mx.array:
    """(..., in / 16, out / 16, 16 K) int16 to the (..., in, out) float16 weights between the rotations."""
    *rest, height, width, _ = trellis.shape
    bits = bits_of(trellis.shape)
    first, second = _order(bits)
    words = trellis.view(mx.uint16).astype(mx.uint32).reshape(-1, 16 * bits)
    pairs = (words[:, first] << 16) | words[:, second]
    at, shift = _places(bits)
    state = mx.take_along_axis(pairs, mx.broadcast_to(at, (pairs.shape[0], TILE_WEIGHTS)), axis=-1)
    state = ((state >> shift) & 0xFFFF).astype(mx.uint16)
    value = mx.take_along_axis(_table(codebook), state.reshape(-1), axis=0)
    tiles = value.reshape(*rest, height, width, TILE, TILE).swapaxes(-3, -2)
    return tiles.reshape(*rest, height * TILE, width * TILE)


def signs(packed: mx.array) -> mx.array:
    """(n / 16,) int16 of older files to (n,) float16 of 1 and -1."""
    bits = (packed.view(mx.uint16)[:, None] >> mx.arange(16, dtype=mx.uint16)) & 1
    return (1 - 2 * bits.astype(mx.int16)).astype(mx.float16).reshape(-1)


def rotate(x: mx.array) -> mx.array:
    """(..., n) float32 with each block of 128 rotated."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    return mx.hadamard_transform(blocks, scale=BLOCK**-0.5).reshape(x.shape)


def padded(x: mx.array, size: int) -> mx.array:
    """(..., n) with zeros up to (..., size)."""
    missing = size - x.shape[-1]
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def dense(trellis: mx.array, suh: mx.array, svh: mx.array, codebook: Codebook) -> mx.array:
    """(out, in) float16: the weight that the tensors stand for, as a Linear has it, still padded."""
    weight = rotate(decode(trellis, codebook).astype(mx.float32).T) * suh  # (out, in)
    return (rotate(weight.T) * svh).T.astype(mx.float16)


def linear(
    x: mx.array, trellis: mx.array, suh: mx.array, svh: mx.array, codebook: Codebook
) -> mx.array:
    """(..., n) with n at most in, to (..., out) float32."""
    height, width, _ = trellis.shape
    entry = rotate(padded(x.astype(mx.float32), height * TILE) * suh)

    def product(tiles: slice, after: list[mx.array]) -> mx.array:
        (part,) = mx.depends([trellis[:, tiles]], after)
        return entry @ decode(part, codebook).astype(mx.float32)

    return rotate(_by_columns(width, height * TILE_WEIGHTS, product)) * svh


def switch(
    x: mx.array,
    indices: mx.array,
    parts: Sequence[tuple[mx.array, Codebook]],
    places: tuple[mx.array, mx.array] | None,
    suh: mx.array,
    svh: mx.array,
    *,
    is_sorted: bool = False,
) -> mx.array:
    """Rows with the expert that each is meant for, as `mx.gather_mm`: x (..., M, n), indices (...) broadcast
    with the leading axes of x, to (..., M, out) float32.

    parts: (E', in / 16, out / 16, 16 K) experts of equal K and codebook. places: (E,) each expert's part and
    its place there; None where all are in one, in order. suh, svh: (E, in), (E, out). Where there are as many
    rows as experts or more each expert is decoded once, else one for each row.
    """
    shape = mx.broadcast_shapes(x.shape[:-2], indices.shape)
    chosen = mx.broadcast_to(indices, shape).reshape(-1)
    x = mx.broadcast_to(x, (*shape, *x.shape[-2:])).reshape(-1, *x.shape[-2:])  # (P, M, n)
    entry = rotate(padded(x.astype(mx.float32), suh.shape[-1]) * suh[chosen][:, None])
    out: mx.array | None = None
    for number, (trellis, codebook) in enumerate(parts):
        if places is None:
            out = _switch_part(entry, chosen, trellis, codebook, is_sorted)
            continue
        is_here = places[0][chosen] == number
        product = _switch_part(entry, mx.where(is_here, places[1][chosen], 0), trellis, codebook, False)
        out = product if out is None else mx.where(is_here[:, None, None], product, out)
    assert out is not None
    return (rotate(out) * svh[chosen][:, None]).reshape(*shape, x.shape[-2], -1)


def _switch_part(
    entry: mx.array, chosen: mx.array, trellis: mx.array, codebook: Codebook, is_sorted: bool
) -> mx.array:
    """(P, M, in) and (P,) places in one part to (P, M, out)."""
    num_experts, height, width, _ = trellis.shape
    num_rows = entry.shape[0]
    if num_rows < num_experts:
        trellis = trellis[chosen]

    def product(tiles: slice, after: list[mx.array]) -> mx.array:
        (part,) = mx.depends([trellis[:, :, tiles]], after)
        weights = decode(part, codebook).astype(mx.float32)
        if num_rows < num_experts:
            return entry @ weights
        return mx.gather_mm(entry, weights, rhs_indices=chosen, sorted_indices=is_sorted)

    return _by_columns(width, trellis.shape[0] * height * TILE_WEIGHTS, product)


def _by_columns(
    width: int, tile_column_weights: int, product: Callable[[slice, list[mx.array]], mx.array]
) -> mx.array:
    """The products with blocks of columns side by side, each begun after the one before is done."""
    done: list[mx.array] = []
    for tiles in _blocks(width, max(1, BLOCK_WEIGHTS // tile_column_weights)):
        done.append(product(tiles, done[-1:]))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=-1)


def _blocks(width: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, width)) for start in range(0, width, size))
