"""Which tensors of a checkpoint one stage reads, from a lazy model whose weights need not be here.

Compute thread only; evaluates nothing.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from shard_loader.absent import Absent
from shard_loader.reads import tensors_read
from shard_loader.shard import Shard
from shard_loader.weights import load_lazily


def own_tensors(model_dir: Path, start: int, stop: int) -> frozenset[str]:
    """The names, as the safetensors headers have them, that layers [start, stop) and what else the stage
    owns are made from. `model_dir` needs the headers only, and siblings for missing files.

    Raises as `shard_loader.weights.load_shard` does for a checkpoint that does not make this model.
    """
    absent = Absent(model_dir)
    tensors: dict[str, mx.array] = {}

    def intake(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        tensors.update(absent.intake(weights))
        return dict(tensors)

    shard = Shard(load_lazily(model_dir, intake=intake), start, stop)
    return frozenset(tensors_read(shard.ownership.groups, tensors))
