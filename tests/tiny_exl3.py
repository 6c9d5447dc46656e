"""Tiny EXL3 checkpoints with random streams, and the same models with the weights that they stand for.

Any stream of bits is a valid trellis, so no encoder is needed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from kernels.exl3 import padded_size
from kernels.exl3_reference import TILE, Codebook, Halves, dense
from tests.tiny_models import _unstack, _write_weights, build, tiny_config, write_tokenizer

_STACKED_EXPERTS = re.compile(r"\.mlp\.experts\.(\w+\.(weight|bias))$")
_SINGLE_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")

Kind = tuple[int, Codebook]  # bits and codebook
KindOf = Callable[[str], Kind | None]

WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def three_bits(path: str) -> Kind | None:
    """Every linear in 3 bits, the head in 6, as most checkpoints have them."""
    if path.endswith((".gate", "embed_tokens")):
        return None
    return (6 if path == "lm_head" else 3), "mcg"


def random_tensors(shape: tuple[int, int], kind: Kind, *, seed: int, size: float = 1.0) -> dict[str, Any]:
    """trellis, suh, svh and a codebook's scalar for a weight of (out, in); NumPy arrays."""
    rng = np.random.default_rng(seed)
    bits, codebook = kind
    num_out, num_in = map(padded_size, shape)
    words = rng.integers(-(1 << 15), 1 << 15, (num_in // TILE, num_out // TILE, TILE * bits), np.int16)

    def scales(count: int, factor: float) -> Halves:
        signs = rng.choice([-1.0, 1.0], count)
        return (signs * rng.uniform(0.5, 1.5, count) * factor).astype(np.float16)

    tensors: dict[str, Any] = {
        "trellis": words,
        "suh": scales(num_in, 1.0),
        "svh": scales(num_out, size / np.sqrt(shape[1])),
    }
    if codebook != "3inst":
        tensors[codebook] = np.array(1, np.int32)
    return tensors


def write_exl3(
    arch: str,
    directory: Path,
    *,
    num_layers: int,
    kind_of: KindOf = three_bits,
    overrides: dict[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    dtype: Any = mx.float32,
) -> tuple[Path, Path]:
    """An EXL3 checkpoint of a tiny `arch` with single experts, and a plain one with the same weights.

    kind_of: the bits and codebook of the weight at a path, or None to leave it plain. dtype: of all that is
    not EXL3's.
    """
    config = tiny_config(arch, num_layers) | {"tie_word_embeddings": False} | WIDE | (overrides or {})
    weights = _published(dict(tree_flatten(build(config, dtype=dtype).parameters())))
    packed: dict[str, mx.array] = {}
    plain: dict[str, mx.array] = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        kind = kind_of(path) if array.ndim == 2 and name.endswith(".weight") else None
        if kind is None:
            packed[name] = plain[name] = array
            continue
        tensors = random_tensors(array.shape, kind, seed=zlib.crc32(path.encode()))
        packed |= {f"{path}.{leaf}": mx.array(value) for leaf, value in tensors.items()}
        num_out, num_in = array.shape
        whole = dense(tensors["trellis"], tensors["suh"], tensors["svh"], kind[1])
        plain[name] = mx.array(whole[:num_out, :num_in].astype(np.float32))
    quantized = {"quant_method": "exl3", "version": "0.0.43", "bits": 3.0, "head_bits": 6, "codebook": "mcg"}
    for folder, tensors_of, extra in (
        (directory / "exl3", packed, {"quantization_config": quantized}),
        (directory / "plain", _stacked(plain) if arch == "gpt_oss" else plain, {}),
    ):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | extra, indent=2, sort_keys=True))
        _write_weights(folder, tensors_of, max_shard_bytes)
        write_tokenizer(folder)
    return directory / "exl3", directory / "plain"


def _published(weights: dict[str, Any]) -> dict[str, Any]:
    """Names and shapes as checkpoints have them before mlx-lm: single experts, kv_b_proj in one."""
    out: dict[str, Any] = {}
    for name, array in _unstack(weights).items():
        stacked = _STACKED_EXPERTS.search(name)
        if stacked:
            path, leaf = name[: stacked.start()], stacked[1]
            out |= {f"{path}.mlp.experts.{i}.{leaf}": one for i, one in enumerate(array)}
        elif name.endswith(".embed_q.weight"):  # (heads, kv_lora_rank, qk_nope_head_dim)
            path = name.removesuffix(".embed_q.weight")
            both = [array.swapaxes(-1, -2), weights[f"{path}.unembed_out.weight"]]
            out[f"{path}.kv_b_proj.weight"] = mx.concatenate(both, axis=1).reshape(-1, array.shape[1])
        elif not name.endswith(".unembed_out.weight"):
            out[name] = array
    return out


def _stacked(weights: dict[str, Any]) -> dict[str, Any]:
    """The inverse for experts, for a model that stacks none itself."""
    out: dict[str, Any] = {}
    for name, array in weights.items():
        single = _SINGLE_EXPERT.search(name)
        if not single:
            out[name] = array
        elif single[1] == "0":
            every = (name.replace(".experts.0.", f".experts.{i}.") for i in range(len(weights)))
            out[name.replace(".experts.0.", ".experts.")] = mx.stack(
                [weights[n] for n in every if n in weights]
            )
    return out
