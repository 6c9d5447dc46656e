"""LoRA and DoRA adapters in mlx-lm's format: what they add to each layer, from their headers alone. Pure but
for reading the files it is given.

A folder with adapter_config.json and adapters.safetensors, as `mlx_lm.lora` writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.headers import ModelFilesError, TensorHeader, read_file_headers, read_json
from planner.model_profile import ModelProfile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapters.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One adapter: the model name that selects it, and its folder."""

    name: str
    path: Path


def read_adapter_config(adapter: AdapterFiles) -> dict[str, Any]:
    """Its adapter_config.json. Raises ModelFilesError with a sentence for what cannot be used."""
    path = adapter.path / CONFIG_NAME
    config = read_json(path, missing=f"{path} is missing: the adapter {adapter.name} is no adapter of mlx-lm")
    if not isinstance(config, dict):
        raise ModelFilesError(f"{path} is not a JSON object")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ModelFilesError(
            f"{path}: fine_tune_type is {kind!r}, and only lora and dora are adapters: fuse it into a model "
            "of its own with mlx_lm.fuse"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not {"rank", "scale", "dropout"} <= parameters.keys():
        raise ModelFilesError(f"{path} has no lora_parameters with rank, scale and dropout")
    if not isinstance(config.get("num_layers"), int):
        raise ModelFilesError(f"{path} has no num_layers")
    return config


def read_adapter_headers(adapter: AdapterFiles) -> list[TensorHeader]:
    """Its tensors. Raises ModelFilesError naming the file."""
    if not (adapter.path / WEIGHTS_NAME).is_file():
        raise ModelFilesError(
            f"{adapter.path / WEIGHTS_NAME} is missing: the adapter {adapter.name} needs it"
        )
    return read_file_headers(adapter.path, WEIGHTS_NAME)


def digest_with(model_digest: str, adapters: Sequence[AdapterFiles]) -> str:
    """`model_digest` itself without adapters; else one that also tells their names and bytes apart."""
    if not adapters:
        return model_digest
    digest = hashlib.sha256(model_digest.encode())
    for adapter in adapters:
        read_adapter_config(adapter)
        read_adapter_headers(adapter)
        digest.update(f"\n{adapter.name}\n".encode())
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            with (adapter.path / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def with_adapters(model: ModelProfile, adapters: Sequence[AdapterFiles]) -> ModelProfile:
    """`model` with the bytes of its adapters: all are kept in memory, one is read for a token.

    Raises ModelFilesError for one that cannot be read, or has tensors for layers that the model lacks.
    """
    layers, embed_bytes, head_bytes = list(model.layers), model.embed_bytes, model.head_bytes
    for adapter in adapters:
        read_adapter_config(adapter)
        for header in read_adapter_headers(adapter):
            index = next((int(part) for part in header.name.split(".") if part.isdecimal()), None)
            if index is None:
                is_embedding = "embed" in header.name or "wte" in header.name
                embed_bytes += header.nbytes if is_embedding else 0
                head_bytes += 0 if is_embedding else header.nbytes
            elif index >= len(layers):
                raise ModelFilesError(
                    f"the adapter {adapter.name} has the tensor {header.name}, but {model.name} has "
                    f"{len(layers)} layers: it belongs to another model"
                )
            else:
                layer = layers[index]
                layers[index] = replace(layer, weight_bytes=layer.weight_bytes + header.nbytes)
    return replace(model, layers=tuple(layers), embed_bytes=embed_bytes, head_bytes=head_bytes)
