"""Where the parameters of a lazily built model come from: a tensor of the files as it lies there, a stack of
separate tensors, or something that sanitize computed.

mlx-lm's `sanitize` gets the full dict of lazy tensors and hands back another; identity of the arrays tells
what it left alone, and `mx.stack` is watched while it runs, so that experts can be put into their places a
few at a time. Only `rows` and `read_into` read. Compute thread only, but for the threads that read files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from planner.headers import ModelFilesError, TensorHeader

BLOCK_BYTES = 2 << 20  # of source data that is in memory beside finished parameters
READERS = 4  # threads that read the parts of one stack: a disk is faster when it is asked for several


@dataclass(frozen=True, slots=True)
class InFile:
    """A tensor as it lies in a file."""

    path: Path
    header: TensorHeader
    array: mx.array  # lazy

    def rows(self) -> Iterator[list[mx.array]]:
        """Blocks of whole rows, each one array (rows, width); several where it is large."""
        header = self.header
        if header.nbytes <= BLOCK_BYTES or not can_write_memory():
            yield [_flat(self.array)]
            return
        height, width = math.prod(header.shape[:-1]), header.shape[-1]
        row_bytes = header.nbytes // height
        count = max(1, BLOCK_BYTES // row_bytes)
        for row in range(0, height, count):
            block = mx.zeros((min(count, height - row), width), self.array.dtype)
            self.read_into(memory_of(block), row * row_bytes)
            yield [block]

    def read_into(self, view: memoryview, offset: int = 0) -> None:
        """Fills `view` with this tensor's bytes from `offset` on. Raises ModelFilesError; any thread."""
        at = self.header.start + offset
        with self.path.open("rb", buffering=0) as file:
            while view:
                count = os.preadv(file.fileno(), [view], at)
                if count <= 0:
                    raise ModelFilesError(f"{self.path} is truncated: {self.header.name} ends too early")
                view, at = view[count:], at + count


class Stack:
    """Arrays of one shape, stacked along a new first axis. Its parts are given up as they are used."""

    def __init__(self, parts: Sequence[InFile | mx.array]) -> None:
        self._parts = [*parts]

    def rows(self) -> Iterator[list[mx.array]]:
        """A few parts at a time, each (rows, width), or a part of one where they are large."""
        parts, self._parts = self._parts[::-1], []
        batch: list[mx.array] = []
        while parts:
            part = parts.pop()
            if isinstance(part, InFile) and part.header.nbytes > BLOCK_BYTES:
                yield from part.rows()
                continue
            batch.append(_flat(part.array if isinstance(part, InFile) else part))
            del part
            if not parts or sum(array.nbytes for array in batch) >= BLOCK_BYTES:
                yield batch
                batch = []

    @property
    def parts(self) -> tuple[InFile | mx.array, ...]:
        """What is stacked, as long as it is not used up."""
        return tuple(self._parts)

    @property
    def is_in_files(self) -> bool:
        """Whether all parts lie in files as they are."""
        return all(isinstance(part, InFile) for part in self._parts)

    def read_into(self, out: mx.array) -> bool:
        """Reads all parts from the files right into an array; False where that is not to be had."""
        parts = [part for part in self._parts if isinstance(part, InFile)]
        if len(parts) < len(self._parts) or not can_write_memory():
            return False
        view, size = memory_of(out), parts[0].header.nbytes
        if size * len(parts) != len(view):
            return False
        slices = [view[i * size : (i + 1) * size] for i in range(len(parts))]
        with ThreadPoolExecutor(READERS, "read-experts") as pool:
            for _ in pool.map(InFile.read_into, parts, slices):
                pass
        self._parts = []
        return True


def can_write_memory() -> bool:
    """Whether an array's memory is the processor's too, as on the CPU and with Metal."""
    return bool(mx.default_device() == mx.cpu or mx.metal.is_available())


def memory_of(array: Any) -> memoryview:
    """The bytes of an array that nothing else knows yet, to be written."""
    mx.eval(array)
    return memoryview(array).cast("B")


Origin = InFile | Stack


class Origins:
    """What is known of each lazy array while a model is built. One for each load."""

    def __init__(self, model_dir: Path, headers: Mapping[str, TensorHeader]) -> None:
        self._model_dir, self._headers = model_dir, headers
        self._known: dict[int, tuple[mx.array, Origin]] = {}  # the array is kept so that its id stays its own

    def watch(
        self, sanitize: Callable[[dict[str, mx.array]], dict[str, mx.array]], weights: dict[str, mx.array]
    ) -> dict[str, mx.array]:
        """sanitize(weights), noting what is in the files and what it stacks."""
        for name, array in weights.items():
            header = self._headers.get(name)
            if header is not None and header.nbytes == array.nbytes:  # MLX keeps the bits as they are
                self._known[id(array)] = (array, InFile(self._model_dir / header.file, header, array))
        stack = mx.stack

        def noted(arrays: Sequence[mx.array], axis: int = 0, **options: Any) -> mx.array:
            parts = list(arrays)
            out = stack(parts, axis, **options)
            if axis == 0 and parts and parts[0].ndim:
                known = [self._known.get(id(part)) for part in parts]
                origins = [found[1] if found is not None else None for found in known]
                sources = [o if isinstance(o, InFile) else p for o, p in zip(origins, parts, strict=True)]
                self._known[id(out)] = (out, Stack(sources))
            return out

        setattr(mx, "stack", noted)  # noqa: B010  (its type stub is stricter than what models pass)
        try:
            return sanitize(weights)
        finally:
            mx.stack = stack

    def keep(self, arrays: Mapping[str, mx.array]) -> None:
        """Forget all but these: they are the model's parameters."""
        ids = {id(array) for array in arrays.values()}
        self._known = {key: value for key, value in self._known.items() if key in ids}

    def of(self, array: mx.array) -> Origin | None:
        """Where an array comes from; None: it is computed in another way."""
        known = self._known.get(id(array))
        return None if known is None else known[1]


def _flat(array: mx.array) -> mx.array:
    """(..., width) as (rows, width)."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)
