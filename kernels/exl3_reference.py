"""EXL3 (trellis) weights decoded from first principles: the specification, in NumPy and one bit at a time.

A linear layer y = x W is stored as W = diag(suh) H Q H diag(svh), where Q is what the trellis decodes to and
H rotates each block of 128 channels. Tensors of a layer, in and out padded to multiples of 128:

    trellis  int16 (in / 16, out / 16, 16 K): a tile of 16 x 16 weights in K bits each, K from 1 to 8
    suh, svh float16 (in,), (out,): what inputs and outputs are multiplied with (with or without a scale)
    su, sv   int16 (in / 16,), (out / 16,): the same in older files, one sign bit each
    mcg, mul1  a scalar whose presence picks the codebook; without one it is "3inst"
    bias     (out,), added last

1. Read as little-endian 32-bit words, a tile is a circular stream of 256 K bits, the highest bit first.
2. The state of weight t is the 16 bits that end with bit (t + 1) K, exclusive.
3. A codebook makes a number of each state, by 32-bit arithmetic that wraps and one rounding to float16.
4. Weight 8 L + j lies in row 2 (L % 4) + (0, 1, 8, 9)[j % 4] and column L / 4 + 8 (j / 4); rows are inputs.

Format: exllamav3, https://github.com/turboderp-org/exllamav3; trellis codes: https://arxiv.org/abs/2406.11235.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

Codebook = Literal["3inst", "mcg", "mul1"]

CODEBOOKS: tuple[Codebook, ...] = get_args(Codebook)
TILE = 16
TILE_WEIGHTS = TILE * TILE
BLOCK = 128  # channels that are rotated together
STATE_BITS = 16
MAX_BITS = 8

_INSTRUCTION = (89226354, 64248484)  # multiplier and summand of "3inst"
_MCG = 0xCBAC1FED
_MUL1 = 0x83DCD12D
_MASK, _FLIP = 0x8FFF8FFF, 0x3B603B60  # leave sign and mantissa of two halves, set their exponents
_SCALE, _OFFSET = 0x1EEE, 0xC931  # of "mul1", bits of float16

Halves = NDArray[np.float16]
States = NDArray[np.uint16]


def bits_of(trellis_shape: tuple[int, ...]) -> int:
    """K of a trellis of this shape. Raises ValueError for a width that is no whole number of bits."""
    bits, rest = divmod(trellis_shape[-1], TILE)
    if rest or not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"a trellis {tuple(trellis_shape)} has {trellis_shape[-1]} words a tile; EXL3 has 16 K for K = 1 "
            f"to {MAX_BITS}"
        )
    return bits


def positions() -> NDArray[np.int64]:
    """(256,) where in its tile, row by row, each weight of the stream lies."""
    found = []
    for t in range(TILE_WEIGHTS):
        lane, j = divmod(t, 8)
        row = 2 * (lane % 4) + (0, 1, 8, 9)[j % 4]
        column = lane // 4 + 8 * (j // 4)
        found.append(row * TILE + column)
    return np.array(found)


def states(trellis: NDArray[np.int16]) -> States:
    """(..., 16 K) words to the (..., 256) states of their weights."""
    bits = bits_of(trellis.shape)
    words = np.ascontiguousarray(trellis).astype("<i2").view("<u4")  # (..., 8 K)
    stream = (words[..., None] >> np.arange(31, -1, -1, dtype=np.uint32)) & np.uint32(1)
    stream = stream.reshape(*words.shape[:-1], TILE_WEIGHTS * bits)
    ends = (np.arange(TILE_WEIGHTS)[:, None] + 1) * bits
    window = stream[..., (ends - STATE_BITS + np.arange(STATE_BITS)) % (TILE_WEIGHTS * bits)]
    powers = np.uint32(1) << np.arange(STATE_BITS - 1, -1, -1, dtype=np.uint32)
    return cast(States, (window * powers).sum(-1, dtype=np.uint32).astype(np.uint16))


def values(state: States, codebook: Codebook) -> Halves:
    """What a codebook makes of states."""
    x = state.astype(np.uint32)
    if codebook == "mul1":
        x = x * np.uint32(_MUL1)
        total = sum((x >> np.uint32(8 * i)) & np.uint32(255) for i in range(4))
        whole = (np.uint32(0x6400) + total).astype(np.uint16).view(np.float16)  # 1024 + total
        scale, offset = (np.uint16(word).view(np.float16).astype(np.float64) for word in (_SCALE, _OFFSET))
        return cast(Halves, (whole.astype(np.float64) * scale + offset).astype(np.float16))  # rounded once
    x = x * np.uint32(_MCG) if codebook == "mcg" else x * np.uint32(_INSTRUCTION[0]) + _INSTRUCTION[1]
    x = (x.astype(np.uint32) & np.uint32(_MASK)) ^ np.uint32(_FLIP)
    low, high = ((x >> np.uint32(shift)).astype(np.uint16).view(np.float16) for shift in (0, 16))
    return cast(Halves, low + high)


def table(codebook: Codebook) -> Halves:
    """(65536,) the value of each state."""
    return values(np.arange(1 << STATE_BITS, dtype=np.uint32).astype(np.uint16), codebook)


def decode(trellis: NDArray[np.int16], codebook: Codebook) -> Halves:
    """(..., in / 16, out / 16, 16 K) words to the (..., in, out) weights Q between the rotations."""
    *rest, height, width, _ = trellis.shape
    tiles = np.empty((*rest, height, width, TILE_WEIGHTS), np.float16)
    tiles[..., positions()] = values(states(trellis), codebook)
    tiles = tiles.reshape(*rest, height, width, TILE, TILE).swapaxes(-3, -2)
    return tiles.reshape(*rest, height * TILE, width * TILE)


def signs(packed: NDArray[np.int16]) -> Halves:
    """(n / 16,) words of older files, the lowest bit first, to (n,) of 1 and -1."""
    bits = (packed.view(np.uint16)[:, None] >> np.arange(16, dtype=np.uint16)) & np.uint16(1)
    return cast(Halves, (1 - 2 * bits.astype(np.int16)).astype(np.float16).reshape(-1))


def hadamard() -> NDArray[np.float64]:
    """(128, 128), Sylvester's, orthonormal and its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(BLOCK))


def rotate(x: NDArray[Any]) -> NDArray[np.float64]:
    """(..., n) with each block of 128 rotated."""
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, BLOCK) @ hadamard()
    return cast("NDArray[np.float64]", blocks.reshape(x.shape))


def dense(trellis: NDArray[np.int16], suh: Halves, svh: Halves, codebook: Codebook) -> NDArray[np.float64]:
    """(out, in) the weight that the tensors stand for, as a Linear has it, still padded."""
    rotated = rotate(decode(trellis, codebook).T).T * suh.astype(np.float64)[:, None]
    return (rotate(rotated) * svh.astype(np.float64)).T
