"""The launches of EXL3 products: which kernel on which grid. What each makes its own file says.

For the thread that owns MLX. Raises RuntimeError where no backend is (kernels.backend).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from kernels.exl3_reference import BLOCK, CODEBOOKS, TILE, Codebook, bits_of
from kernels.source import Kernel

SIMD, SIMDGROUPS = 32, 8
MAX_ROWS = 8  # of a threadgroup
TILE_ROWS = 4  # of those of one expert
BUSY_GROUPS = 256  # threadgroups that keep a large GPU busy
MIN_BLOCKS = 4  # of 128 inputs, in each part

HEADERS = ("exl3.h",)
DECODE = Kernel("exl3_decode", ("x", "trellis", "suh", "svh", "bias", "indices", "tiles"), ("y",), HEADERS)
FINISH = Kernel("exl3_finish", ("parts", "svh", "bias", "indices"), ("y",), HEADERS)
UNPACK = Kernel("exl3_unpack", ("trellis",), ("weights",), HEADERS)
PLAN = Kernel("exl3_plan", ("indices",), ("order", "tiles"))
PLAN_THREADS = 1024
TILE_PAIRS = 32  # of one expert, planned together
_SINGLE, _PAIRS, _TILES = range(3)


@dataclass(frozen=True, slots=True)
class Plan:
    """The pairs (token, choice) sorted by expert, and cut into tiles.

    order: (pairs,) uint32; tiles: (1 + room, 4) uint32, as exl3_plan.metal says; room: how many fit.
    """

    order: mx.array
    tiles: mx.array
    room: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight, or experts of one kind with a leading axis; bias (out,) or (E, out) as long as the layer's
    outputs, or None."""

    trellis: mx.array  # (.., in / 16, out / 16, 16 K)
    suh: mx.array  # (.., in)
    svh: mx.array  # (.., out)
    bias: mx.array | None
    codebook: Codebook
    output_dims: int

    @property
    def height(self) -> int:
        return self.trellis.shape[-3] * TILE

    @property
    def width(self) -> int:
        return self.trellis.shape[-2] * TILE

    @property
    def bits(self) -> int:
        return bits_of(self.trellis.shape)

    def product(self, x: mx.array) -> mx.array:
        """(rows, n) with n at most in, to (rows, output_dims) in the dtype of x, in one launch or two."""
        rows = 1
        while rows < min(MAX_ROWS, x.shape[0]):
            rows *= 2
        return self._decode(x, _SINGLE, rows=rows, groups=-(-x.shape[0] // rows), num_out=x.shape[0])

    def pairs(self, x: mx.array, indices: mx.array) -> mx.array:
        """Row i of the answer is row i // share of x with expert indices[i]; share is indices / rows of x."""
        return self._decode(x, _PAIRS, groups=indices.size, num_out=indices.size, indices=indices)

    def tiles(self, x: mx.array, indices: mx.array, made: Plan) -> mx.array:
        """As `pairs`, with a weight decoded once for up to TILE_ROWS rows of its expert."""
        return self._decode(
            x, _TILES, rows=TILE_ROWS, groups=made.room, num_out=indices.size, indices=indices, made=made
        )

    def unpacked(self) -> mx.array:
        """(.., in, out) float16 between the rotations."""
        *lead, height, width, _ = self.trellis.shape
        return UNPACK(
            [self.trellis],
            template={"BITS": self.bits, "BOOK": CODEBOOKS.index(self.codebook)}
            | {"HEIGHT": self.height, "WIDTH": self.width},
            grid=(width * TILE // BLOCK * SIMDGROUPS * SIMD, height, lead[0] if lead else 1),
            threadgroup=(SIMDGROUPS * SIMD, 1, 1),
            shapes=[(*lead, self.height, self.width)],
            dtypes=[mx.float16],
        )[0]

    def _decode(
        self,
        x: mx.array,
        mode: int,
        *,
        rows: int = 1,
        groups: int,
        num_out: int,
        indices: mx.array | None = None,
        made: Plan | None = None,
    ) -> mx.array:
        blocks = self.width // BLOCK
        splits = self._num_splits(blocks * groups)
        indices = _nothing() if indices is None else indices
        bias = self.svh if self.bias is None else self.bias
        sizes = {"WIDTH": self.width, "OUT": self.output_dims, "SPLITS": splits}
        sizes |= {"MODE": mode, "BIASED": self.bias is not None}
        found = DECODE(
            [
                *(x, self.trellis, self.suh, self.svh, bias),
                indices if made is None else made.order,
                _nothing() if made is None else made.tiles,
            ],
            template={
                **sizes,
                "BITS": self.bits,
                "BOOK": CODEBOOKS.index(self.codebook),
                "ROWS": rows,
                "IN": x.shape[-1],
                "HEIGHT": self.height,
                "SHARE": 1 if mode == _SINGLE else num_out // x.shape[0],
                "Y": x.dtype if splits == 1 else mx.float32,
            },
            grid=(blocks * SIMDGROUPS * SIMD, splits, groups),
            threadgroup=(SIMDGROUPS * SIMD, 1, 1),
            shapes=[(num_out, self.output_dims) if splits == 1 else (splits, num_out, self.width)],
            dtypes=[x.dtype if splits == 1 else mx.float32],
        )[0]
        if splits == 1:
            return found
        return FINISH(
            [found, self.svh, bias, indices],
            template={**sizes, "Y": x.dtype},
            grid=(blocks * SIMD, num_out, 1),
            threadgroup=(SIMD, 1, 1),
            shapes=[(num_out, self.output_dims)],
            dtypes=[x.dtype],
        )[0]

    def _num_splits(self, groups: int) -> int:
        """Parts of the inputs, a power of two: as many as keep a GPU busy, none smaller than MIN_BLOCKS."""
        splits = 1
        while groups * splits < BUSY_GROUPS and self.height // BLOCK // (2 * splits) >= MIN_BLOCKS:
            splits *= 2
        return splits


def plan(indices: mx.array, num_experts: int) -> Plan:
    """(pairs,) experts sorted, and cut into tiles: one launch."""
    room = min(indices.size, num_experts + indices.size // TILE_PAIRS)
    order, tiles = PLAN(
        [indices],
        template={"E": num_experts, "TOPK": 1, "TILE": TILE_PAIRS},
        grid=(PLAN_THREADS, 1, 1),
        threadgroup=(PLAN_THREADS, 1, 1),
        shapes=[(max(indices.size, 8),), (1 + room, 4)],
        dtypes=[mx.uint32, mx.uint32],
    )
    return Plan(order, tiles, room)


@cache
def _nothing() -> mx.array:
    """In the place of what a mode does not read; of 8 elements, so that its address space is the same."""
    return mx.zeros(8, mx.uint32)
