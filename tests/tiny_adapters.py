"""Random adapters in mlx-lm's format for a checkpoint, and what mlx-lm makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

LEAVES = ("lora_a", "lora_b", "m")


def write_adapter(
    model: Path,
    directory: Path,
    *,
    kind: str = "lora",
    num_layers: int = 16,
    keys: list[str] | None = None,
    seed: int = 1,
) -> Path:
    """An adapter as `mlx_lm.lora` writes it, with random numbers large enough to change tokens."""
    parameters: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.1}
    if keys is not None:
        parameters["keys"] = keys
    whole = load_model(model, lazy=True)[0]
    linear_to_lora_layers(whole, num_layers, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, value in tree_flatten(whole.parameters()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf in LEAVES:
            noise = mx.array(rng.standard_normal(value.shape, dtype=np.float32))
            tensors[name] = value * (1 + 0.2 * noise) if leaf == "m" else 0.2 * noise
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def adapted(model: Path, adapter: Path | None) -> nn.Module:
    """mlx-lm's own model with its own `load_adapters`."""
    whole = load_model(model)[0]
    if adapter is not None:
        load_adapters(whole, str(adapter))
        whole.eval()
    return whole
