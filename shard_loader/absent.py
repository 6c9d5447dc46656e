"""Tensors of a model folder whose bytes are not here: put out of reach, and refused by name.

A sparse file has the right size, so reading a hole would give zeros without a word. Before mlx-lm sees them,
such tensors are therefore replaced by ghosts (NaN, no memory, no file), and after it has built the model
everything that the shard would load is checked for them. Compute thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from planner.headers import TensorHeader, read_checkpoint
from planner.missing import missing_tensors
from shard_loader.layout import ghost
from shard_loader.reads import tensors_read
from shard_loader.spans import covers
from shard_loader.store import Store

# How MLX reads what safetensors names; forms that it keeps as bytes are uint8 there too.
_DTYPES: dict[str, Any] = {
    "BOOL": mx.bool_,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "C64": mx.complex64,
}


class Absent:
    """What is absent from the model folder, and why."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._missing = missing_tensors(model_dir)
        self._holes = _holes(model_dir)
        self._ghosts: dict[str, mx.array] = {}

    def intake(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The lazy tensors as read from the files, with a ghost for each that is absent."""
        self._ghosts = {name: _stand_in(header) for name, header in self._missing.items()}
        self._ghosts |= {name: ghost(weights[name]) for name in self._holes if name in weights}
        return {**weights, **self._ghosts}

    def refusal(self, groups: Sequence[Mapping[str, mx.array]], start: int, stop: int) -> str:
        """Why the arrays of layers [start, stop) cannot be loaded, by tensor and file; empty if they can."""
        read = sorted(tensors_read(groups, self._ghosts, are_ghosts=True)) if self._ghosts else []
        if not read:
            return ""
        others = f" and {len(read) - 1} more" if len(read) > 1 else ""
        if read[0] in self._missing:
            file = self._model_dir / self._missing[read[0]].file
            return f"{file} is missing, and layers {start}:{stop} read {read[0]}{others} from it: download it"
        hole = self._model_dir / self._holes[read[0]].file
        return (
            f"{read[0]}{others} of {hole} has not been fetched, and layers {start}:{stop} read it: "
            "start the node again, or download the model"
        )


def _holes(model_dir: Path) -> dict[str, TensorHeader]:
    store = Store.open(model_dir)
    if store is None:
        return {}
    covered = {name: store.journal.covered(name) for name in store.manifest.files}
    return {
        header.name: header
        for header in read_checkpoint(model_dir).headers.values()
        if not covers(covered.get(header.file, []), header.start, header.start + header.nbytes)
    }


def _stand_in(header: TensorHeader) -> mx.array:
    dtype = _DTYPES.get(header.dtype, mx.uint8)
    fill = float("nan") if mx.issubdtype(dtype, mx.inexact) else 0
    return mx.broadcast_to(mx.array(fill, dtype), header.shape)
