"""Arrays for numbers that come from outside, in memory that is used again and again. Compute thread only.

On CUDA, memory that the processor may write is a buffer of MLX's cache, moved out of the device's pool: that
costs a copy and an allocation for each array, and fails while the device still works on what was given to it
before (MLX 0.32.4: "cudaMemcpy ... invalid argument"). So a few arrays of each kind are made while the device
rests, and written in turns.
"""

from __future__ import annotations

from collections import OrderedDict

import mlx.core as mx
import numpy as np

from proto.codec import ITEM_BYTES, Tensor
from shard_loader.carry import from_wire, memory

TURNS = 6  # frames that are built, run or end at once, and one more
MAX_BYTES = 8 << 20  # of an array that is kept
MAX_KEPT_BYTES = 256 << 20  # of all of them

Kind = tuple[str, tuple[int, ...]]  # dtype, shape


class KeptArrays:
    """A few arrays of each kind, of the kinds that were used last: within MAX_KEPT_BYTES."""

    def __init__(self) -> None:
        self._of: OrderedDict[Kind, list[mx.array]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of those that are here."""
        return sum(array.nbytes for arrays in self._of.values() for array in arrays)

    def of(self, kind: Kind) -> list[mx.array] | None:
        """Those of this kind, to take from and to give back to; None: nobody has made any."""
        if kind in self._of:
            self._of.move_to_end(kind)
        return self._of.get(kind)

    def add(self, kind: Kind, arrays: list[mx.array]) -> None:
        """The first ones of this kind; others go."""
        self._of[kind] = arrays
        while len(self._of) > 1 and self.nbytes > MAX_KEPT_BYTES:
            self._of.popitem(last=False)


class HostArrays:
    """`is_kept`: on a device of its own memory; else each array is made anew, as is cheapest there."""

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self._kept = KeptArrays()

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return self._kept.nbytes

    def tokens(self, rows: list[list[int]]) -> mx.array:
        """(B, T) int32"""
        data = np.array(rows, np.int32)
        return self.of(Tensor("int32", data.shape, data.tobytes()))

    def of(self, tensor: Tensor) -> mx.array:
        """An array with the tensor's bits, as `from_wire` makes it; raises CarryError as that does."""
        if not self._is_kept or not tensor.shape:
            return from_wire(tensor)
        kind = (tensor.dtype, tensor.shape)
        if self._kept.of(kind) is None:
            first = made(tensor)  # refuses what makes no sense
            if len(tensor.data) > MAX_BYTES or not len(tensor.data):
                return first
            self._kept.add(kind, [*(made(tensor) for _ in range(TURNS - 1)), first])
            return first
        array = self.blank(kind)
        if len(tensor.data) != array.nbytes:
            return from_wire(tensor)  # refuses it
        write(array, tensor.data)
        return array

    def blank(self, kind: Kind) -> mx.array:
        """An array to be written before it is evaluated."""
        dtype, shape = kind
        if not self._is_kept:
            return from_wire(zeros(dtype, shape))
        if (arrays := self._kept.of(kind)) is None:
            return self.of(zeros(dtype, shape))
        arrays.append(arrays.pop(0))
        return arrays[-1]


def write(array: mx.array, data: bytes | memoryview) -> None:
    """Its bits are those from now on; whatever is evaluated later sees them."""
    if len(data):
        memory(array).cast("B")[:] = data


def made(tensor: Tensor) -> mx.array:
    """In memory that the processor may use: it stays there."""
    mx.synchronize()
    array = from_wire(tensor)
    memory(array)
    return array


def zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros."""
    return Tensor(dtype, shape, bytes(ITEM_BYTES[dtype] * int(np.prod(shape))))
