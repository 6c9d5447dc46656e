"""Arrays for numbers that come from outside, in memory that is used again and again. Compute thread only.

On CUDA, memory that the processor may write is a buffer of MLX's cache, moved out of the device's pool: that
costs a copy and an allocation for each array, and fails while the device still works on what was given to it
before (MLX 0.32.4: "cudaMemcpy ... invalid argument"). So a few arrays of each kind are made while the device
rests, and written in turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from proto.codec import ITEM_BYTES, Tensor
from shard_loader.carry import from_wire, memory

TURNS = 6  # frames that are built, run or end at once, and one more
MAX_ALIKE = 2  # of one kind in a carry, so that three frames have theirs at once; others are made anew
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

    def take(self, kind: Kind) -> mx.array:
        """The one that was given back longest ago; a new one where all are away."""
        arrays = self.of(kind)
        return arrays.pop(0) if arrays else made(zeros(*kind))


class Keeper:
    """`is_kept`: on a device of its own memory, whose arrays the processor can use only at a cost."""

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self._kept = KeptArrays()

    @property
    def nbytes(self) -> int:
        """What is kept, and not under way."""
        return self._kept.nbytes


class HostArrays(Keeper):
    """Where none is kept, each array is made anew, as is cheapest there."""

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
        array = self._kept.take(kind)
        self.give_back([array], [kind])
        if len(tensor.data) != array.nbytes:
            return from_wire(tensor)  # refuses it
        write(array, tensor.data)
        return array

    def carry(self, tensors: Sequence[Tensor], *, is_held: bool = False) -> list[mx.array]:
        """`of` each of them: all of one frame, of which none is another's.

        is_held: caches may hold them when the frame is done, so that they are made anew.
        """
        if is_held:
            return [from_wire(tensor) for tensor in tensors]
        kept = _first_ones((tensor.dtype, tensor.shape) for tensor in tensors)
        return [self.of(t) if is_one else from_wire(t) for t, is_one in zip(tensors, kept, strict=True)]

    def blanks(self, kinds: Sequence[Kind]) -> list[mx.array]:
        """Arrays to be written before they are evaluated: nobody else's until they are given back."""
        if not self._is_kept:
            return [from_wire(zeros(*kind)) for kind in kinds]
        kept = zip(kinds, _first_ones(kinds), strict=True)
        return [self._blank(kind) if is_one else made(zeros(*kind)) for kind, is_one in kept]

    def give_back(self, arrays: Sequence[mx.array], kinds: Sequence[Kind]) -> None:
        """Those of `blanks`: their numbers are written, or never will be. Others have them in their turn."""
        for array, kind, is_one in zip(arrays, kinds, _first_ones(kinds), strict=True):
            if is_one and (place := self._kept.of(kind)) is not None:
                place.append(array)

    def _blank(self, kind: Kind) -> mx.array:
        if self._kept.of(kind) is None:
            first = self.of(zeros(*kind))
            if self._kept.of(kind) is None:  # not one to keep
                return first
        return self._kept.take(kind)


def _first_ones(kinds: Iterable[Kind]) -> list[bool]:
    """Whether each is one of the first MAX_ALIKE of its kind."""
    num: dict[Kind, int] = {}
    out = []
    for kind in kinds:
        num[kind] = num.get(kind, 0) + 1
        out.append(num[kind] <= MAX_ALIKE)
    return out


def write(array: mx.array, data: bytes | memoryview) -> None:
    """Its bits are those from now on; whatever is evaluated later sees them."""
    place(array)[:] = data


def place(array: mx.array) -> memoryview:
    """Its bytes, to be written."""
    return memory(array).cast("B") if array.nbytes else memoryview(bytearray())


def made(tensor: Tensor) -> mx.array:
    """In memory that the processor may use: it stays there."""
    mx.synchronize()
    array = from_wire(tensor)
    memory(array)
    return array


def zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros."""
    return Tensor(dtype, shape, bytes(ITEM_BYTES[dtype] * prod(shape)))
