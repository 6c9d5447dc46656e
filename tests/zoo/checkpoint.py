"""A zoo model as a folder that mlx-lm and the shard loader read."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from shard_loader.rehearsal import Rehearsal
from tests.zoo.configs import zoo_config


def write_zoo_checkpoint(name: str, folder: Path) -> Path:
    """Writes config.json and float32 weights of the architecture's tiny random model; returns `folder`."""
    rehearsal = Rehearsal(zoo_config(name))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(rehearsal.config))
    weights = dict(tree_flatten(rehearsal.model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder
