"""Where the parameters of a lazily built model come from: a tensor of the files as it lies there, a stack of
separate tensors, or something that sanitize computed.

mlx-lm's `sanitize` gets the full dict of lazy tensors and hands back another; identity of the arrays tells
what it left alone, and `mx.stack` is watched while it runs, so that experts can be put into their places a
few at a time. Only `rows` reads. Compute thread only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from planner.headers import ModelFilesError, TensorHeader

BLOCK_BYTES = 16 << 20  # of source data that is in memory beside finished parameters

_NUMPY_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class InFile:
    """A float tensor as it lies in a file; read in blocks of rows where it is large."""

    path: Path
    header: TensorHeader
    array: mx.array  # lazy

    def rows(self) -> Iterator[list[mx.array]]:
        """Blocks of at most BLOCK_BYTES, each one array (rows, width)."""
        header = self.header
        if header.nbytes <= BLOCK_BYTES or header.dtype not in _NUMPY_DTYPES:
            yield [_flat(self.array)]
            return
        width = header.shape[-1]
        row_bytes = header.nbytes // math.prod(header.shape[:-1])
        block_bytes = max(1, BLOCK_BYTES // row_bytes) * row_bytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(header.start)
            left = header.nbytes
            while left:
                buffer = bytearray(min(block_bytes, left))
                self._fill(file, buffer)
                left -= len(buffer)
                yield [mx.array(np.frombuffer(buffer, _NUMPY_DTYPES[header.dtype]).reshape(-1, width))]

    def _fill(self, file: Any, buffer: bytearray) -> None:
        view = memoryview(buffer)
        while view:
            count = file.readinto(view)
            if not count:
                raise ModelFilesError(f"{self.path} is truncated: {self.header.name} ends too early")
            view = view[count:]


@dataclass(slots=True)
class Stack:
    """Arrays of one shape, stacked along a new first axis. Its parts are given up as they are used."""

    parts: list[mx.array]

    def rows(self) -> Iterator[list[mx.array]]:
        """A few parts at a time, each (rows, width)."""
        parts, self.parts = self.parts[::-1], []
        count = max(1, BLOCK_BYTES // max(parts[0].nbytes, 1))
        while parts:
            yield [_flat(parts.pop()) for _ in range(min(count, len(parts)))]


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
            if header is not None:
                self._known[id(array)] = (array, InFile(self._model_dir / header.file, header, array))
        stack = mx.stack

        def noted(arrays: Sequence[mx.array], axis: int = 0, **options: Any) -> mx.array:
            parts = list(arrays)
            out = stack(parts, axis, **options)
            if axis == 0 and parts and parts[0].ndim:
                self._known[id(out)] = (out, Stack(parts))
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
