"""Where the numbers land that the host reads of a step. Compute thread only.

On CUDA an array lies in the device's own pool until the processor asks for it; then MLX makes other memory
for it and copies it there, for each array anew (MLX 0.32.4: 0.2 to 0.6 ms, and up to 6 beside a step that
runs). So a step writes what is read of it into arrays that the processor has used before: they stay there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import mlx.core as mx

from proto.codec import Tensor
from shard_loader.carry import dtype_name, memory, to_wire
from shard_loader.host_arrays import MAX_BYTES, TURNS, Keeper, made, zeros


@dataclass(frozen=True, slots=True)
class Landed:
    """array: to be evaluated, then `read`. place: where it goes back to; None: it is read where it is."""

    array: mx.array
    dtype: str
    shape: tuple[int, ...]
    place: list[mx.array] | None = None

    def read(self) -> Tensor:
        """Its bytes, as `to_wire` gives them; they stay until TURNS - 1 others of its kind have landed."""
        if self.place is None:
            return to_wire(self.array)
        self.give_back()
        num_bytes = prod(self.shape) * self.array.itemsize
        return Tensor(self.dtype, self.shape, memory(self.array).cast("B")[:num_bytes])

    def give_back(self) -> None:
        """It is evaluated, and read or not wanted any more."""
        if self.place is not None:
            self.place.append(self.array)


class Landing(Keeper):
    """Where none is kept, arrays are read where they are."""

    def of(self, x: mx.array) -> Landed:
        """What is to be evaluated in its stead. Raises CarryError for a dtype that cannot cross a cut."""
        dtype, shape = dtype_name(x), tuple(x.shape)
        if not self._is_kept or not x.size or x.nbytes > MAX_BYTES:
            return Landed(x, dtype, shape)
        kind = (dtype, (1 << x.size.bit_length(),))  # larger than it, or all of it would be replaced
        if (place := self._kept.of(kind)) is None:
            self._kept.add(kind, place := [made(zeros(*kind)) for _ in range(TURNS)])
        array = self._kept.take(kind)  # of a step that failed nothing comes back
        array[: x.size] = x.reshape(-1)
        return Landed(array, dtype, shape, place)
