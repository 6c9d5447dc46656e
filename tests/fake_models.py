"""Checkpoints with headers but only zeros behind them, and made-up profiles for the solver. No MLX."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.headers import CONFIG_NAME, DTYPE_BITS, INDEX_NAME, TensorHeader
from planner.kv_profile import CacheProfile
from planner.layer_profile import LayerProfile
from planner.model_profile import ModelProfile
from planner.node_profile import GB, NodeProfile, make_node

CHIPS = (
    ("Apple M1", 8),
    ("Apple M4", 10),
    ("Apple M4 Pro", 20),
    ("Apple M3 Ultra", 80),
    ("Apple M2 Max", 38),
)
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name to (safetensors dtype, shape)


def write_file(path: Path, tensors: Tensors) -> None:
    """One safetensors file; its data is a hole in the file system."""
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)


def write_model(folder: Path, config: Mapping[str, Any], *files: Tensors) -> Path:
    """A model folder; more than one file get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    if len(files) == 1:
        write_file(folder / "model.safetensors", files[0])
        return folder
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def headers_of(tensors: Tensors) -> dict[str, TensorHeader]:
    """The headers of tensors that lie in no file."""
    return {
        name: TensorHeader(
            name, dtype, shape, "model.safetensors", 0, math.prod(shape) * DTYPE_BITS[dtype] // 8
        )
        for name, (dtype, shape) in tensors.items()
    }


def llama_config(num_layers: int = 4, **overrides: Any) -> dict[str, Any]:
    """A llama of 64 hidden, 4 heads and 2 key heads of 16."""
    return {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": num_layers,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    } | overrides


def llama_tensors(num_layers: int = 4, dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of `llama_config`."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": (dtype, (320, 64))}
    for i in range(num_layers):
        for name, shape in (
            ("self_attn.q_proj.weight", (64, 64)),
            ("self_attn.k_proj.weight", (32, 64)),
            ("self_attn.v_proj.weight", (32, 64)),
            ("self_attn.o_proj.weight", (64, 64)),
            ("mlp.gate_proj.weight", (128, 64)),
            ("mlp.up_proj.weight", (128, 64)),
            ("mlp.down_proj.weight", (64, 128)),
            ("input_layernorm.weight", (64,)),
            ("post_attention_layernorm.weight", (64,)),
        ):
            tensors[f"model.layers.{i}.{name}"] = (dtype, shape)
    return tensors | {"model.norm.weight": (dtype, (64,)), "lm_head.weight": (dtype, (320, 64))}


def made_up_model(
    layer_bytes: Sequence[int],
    *,
    embed_bytes: int = 0,
    head_bytes: int = 0,
    is_tied: bool = False,
    kv_token_bytes: int = 0,
    hidden_size: int = 64,
    vocab_size: int = 8,
) -> ModelProfile:
    """A model of layers with the given weights, all active, and little scratch."""
    return ModelProfile(
        name="made-up",
        digest="0" * 16,
        model_type="llama",
        max_context=1 << 20,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_heads=1,
        head_dim=64,
        dtype_bytes=2,
        layers=tuple(
            LayerProfile(
                weight_bytes=nbytes,
                active_bytes=nbytes,
                active_params=nbytes // 2,
                output_width=1,
                score_copies=2,
                scan_bytes=0,
                cache=CacheProfile(token_bytes=kv_token_bytes),
            )
            for nbytes in layer_bytes
        ),
        embed_bytes=embed_bytes,
        norm_bytes=0,
        head_bytes=0 if is_tied else head_bytes,
        is_tied=is_tied,
    )


def node(rank: int, budget_gb: float, chip: str = "Apple M4", **overrides: object) -> NodeProfile:
    """A node with exactly that budget."""
    budget_bytes = int(budget_gb * GB)
    made = make_node(
        rank, f"n{rank}", f"host{rank}", chip=chip, memory_bytes=budget_bytes, ceiling_bytes=budget_bytes
    )
    return replace(made, reserve_bytes=0, **overrides)
