"""EXL3 (trellis) products in MLX's own operations: what runs where no kernel does, on any device.

A state is looked up in a table of all 65536 values of its codebook, so a decoded weight has the bits of
`kernels.exl3_reference`. Nothing decoded is kept: each call decodes a block of tiles, multiplies with it and
lets it go before the next, so that beside the tensors no more than `block_weights` decoded weights are in
memory. For the thread that owns MLX; evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kernels import exl3_reference as reference
from kernels.exl3_reference import BLOCK, TILE, TILE_WEIGHTS, Codebook, bits_of

BLOCK_TILES = BLOCK // TILE


@dataclass(frozen=True, slots=True)
class Decoder:
    """How weights are decoded. decode: (.., in / 16, out / 16, 16 K) words to (.., in, out) float16."""

    decode: Callable[[mx.array, Codebook], mx.array]
    block_weights: int  # that are decoded at once
    is_exact: bool  # products in float32; else in the dtype of the rows, where the device has such products

    def dtype(self, x: mx.array) -> mx.Dtype:
        """Of a product with rows x."""
        return mx.float32 if self.is_exact or mx.default_device() == mx.Device(mx.cpu) else x.dtype


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


PLAIN = Decoder(decode, 1 << 20, is_exact=True)


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
    x: mx.array,
    trellis: mx.array,
    suh: mx.array,
    svh: mx.array,
    codebook: Codebook,
    *,
    bias: mx.array | None,
    decoder: Decoder = PLAIN,
) -> mx.array:
    """(..., n) with n at most in, to (..., out) in the dtype of x. bias: (out,) or less."""
    height, width, _ = trellis.shape
    dtype = decoder.dtype(x)
    entry = rotate(padded(x.astype(mx.float32), height * TILE) * suh).astype(dtype)
    done: list[mx.array] = []
    for columns in _columns(decoder, height, width):
        total: mx.array | None = None
        for rows in _rows(decoder, height, columns):
            (tiles,) = mx.depends([trellis[rows, columns]], _last(total, done))
            weights = decoder.decode(tiles, codebook).astype(dtype)
            part = (entry[..., _channels(rows)] @ weights).astype(mx.float32)
            total = part if total is None else total + part
        assert total is not None
        own = _channels(columns)
        total = rotate(total) * svh[own]
        done.append((total if bias is None else total + padded(bias[own], total.shape[-1])).astype(x.dtype))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=-1)


def switch(
    x: mx.array,
    indices: mx.array,
    parts: Sequence[tuple[mx.array, Codebook]],
    *,
    places: tuple[mx.array, mx.array] | None,
    suh: mx.array,
    svh: mx.array,
    bias: mx.array | None,
    is_sorted: bool = False,
    decoder: Decoder = PLAIN,
) -> mx.array:
    """Rows with the expert that each is meant for, as `mx.gather_mm`: x (..., M, n), indices (...) broadcast
    with the leading axes of x, to (..., M, out) in the dtype of x.

    parts: (E', in / 16, out / 16, 16 K) experts of equal K and codebook. places: (E,) each expert's part and
    its place there; None where all are in one, in order. suh, svh, bias: (E, in), (E, out), (E, out or less).
    Where there are as many rows as experts or more each expert is decoded once, else one for each row.
    """
    shape = mx.broadcast_shapes(x.shape[:-2], indices.shape)
    chosen = mx.broadcast_to(indices, shape).reshape(-1)
    x = mx.broadcast_to(x, (*shape, *x.shape[-2:])).reshape(-1, *x.shape[-2:])  # (P, M, n)
    entry = rotate(padded(x.astype(mx.float32), suh.shape[-1]) * suh[chosen][:, None])
    entry = entry.astype(decoder.dtype(x))
    kinds = [_Kind(entry, trellis, book, decoder, is_sorted and places is None) for trellis, book in parts]
    is_here = [mx.array(True)] if places is None else [places[0][chosen] == i for i in range(len(parts))]
    own = [chosen] if places is None else [mx.where(here, places[1][chosen], 0) for here in is_here]
    done: list[mx.array] = []
    height, width = parts[0][0].shape[1:3]
    most = max(trellis.shape[0] for trellis, _ in parts)
    for columns in _columns(decoder, height, width, most):
        total: mx.array | None = None
        for rows in _rows(decoder, height, columns, most):
            part: mx.array | None = None
            for kind, here, at in zip(kinds, is_here, own, strict=True):
                found = kind.product(at, rows, columns, _last(part if part is not None else total, done))
                part = found if part is None else mx.where(here[:, None, None], found, part)
            assert part is not None
            total = part if total is None else total + part
        assert total is not None
        channels = _channels(columns)
        total = rotate(total) * svh[chosen, None, channels]
        if bias is not None:
            total = total + padded(bias[chosen, None, channels], total.shape[-1])
        done.append(total.astype(x.dtype))
    out = done[0] if len(done) == 1 else mx.concatenate(done, axis=-1)
    return out.reshape(*shape, *out.shape[-2:])


@dataclass(frozen=True, slots=True)
class _Kind:
    """Rows (P, M, in) to multiply with experts of one kind."""

    entry: mx.array
    trellis: mx.array  # (E, in / 16, out / 16, 16 K)
    codebook: Codebook
    decoder: Decoder
    is_sorted: bool

    def product(self, at: mx.array, rows: slice, columns: slice, after: list[mx.array]) -> mx.array:
        """(P, M, 16 columns) of some rows of tiles; at: (P,) the expert of each row."""
        entry, tiles = self.entry[..., _channels(rows)], self.trellis[:, rows, columns]
        is_single = entry.shape[0] < tiles.shape[0]
        (tiles,) = mx.depends([tiles[at] if is_single else tiles], after)
        weights = self.decoder.decode(tiles, self.codebook).astype(entry.dtype)
        if is_single:
            return (entry @ weights).astype(mx.float32)
        made = mx.gather_mm(entry, weights, rhs_indices=at, sorted_indices=self.is_sorted)
        return made.astype(mx.float32)


def _columns(decoder: Decoder, height: int, width: int, count: int = 1) -> list[slice]:
    """Blocks of columns of tiles, each of whole blocks of channels, of `count` experts together."""
    size = decoder.block_weights // (count * height * TILE_WEIGHTS) // BLOCK_TILES * BLOCK_TILES
    return _slices(width, max(BLOCK_TILES, size))


def _rows(decoder: Decoder, height: int, columns: slice, count: int = 1) -> list[slice]:
    """Blocks of rows of tiles, where some columns of all of them are too much."""
    row_weights = count * (columns.stop - columns.start) * TILE_WEIGHTS
    return _slices(height, max(1, decoder.block_weights // row_weights))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _channels(tiles: slice) -> slice:
    return slice(tiles.start * TILE, tiles.stop * TILE)


def _last(total: mx.array | None, done: list[mx.array]) -> list[mx.array]:
    """What must be computed before the next block is decoded."""
    return [total] if total is not None else done[-1:]
