"""Checkpoints of published sizes, headers with only holes behind them, and what they weigh by their shapes.

The shapes are those of mlx-lm's own modules, which are made and never evaluated; the planner is not asked.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from planner.headers import DTYPE_BITS
from tests.fake_models import write_model
from tests.real_configs import REAL_CONFIGS

FILE_BYTES = 100 * 10**9
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERTS = re.compile(r"\.(switch_mlp|experts)\.")
_NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32", mx.uint8: "U8"}


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture of tests/real_configs.py; `windows` by layer: its cache keeps so many tokens."""

    arch: str
    dtype: str  # F32 or BF16, of floats
    bits: int | None  # of linears and embeddings; None: not quantised
    cached: int  # elements that a layer's cache keeps of a token
    windows: tuple[int, int] = (0, 0)  # tokens; every so-manyth layer, counted from 1, keeps all
    expert_share: float = 1.0  # of the routed experts, for one token

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.dtype if self.bits is None else f'{self.bits}bit'}"

    def window(self, layer: int) -> int | None:
        window, period = self.windows
        return None if not window or (layer + 1) % period == 0 else window


SHAPES = (
    Shape("llama", "BF16", None, 2 * 8 * 128),
    Shape("llama", "F32", None, 2 * 8 * 128),
    Shape("qwen3", "BF16", 4, 2 * 8 * 128),  # tied
    Shape("qwen3_moe", "BF16", 4, 2 * 4 * 128, expert_share=8 / 128),
    Shape("deepseek_v3", "BF16", 4, 512 + 64, expert_share=8 / 256),  # a latent and a rotary key
    Shape("gemma3_text", "BF16", None, 2 * 1 * 256, windows=(512, 6)),  # tied
    Shape("gpt_oss", "BF16", 4, 2 * 8 * 64, windows=(128, 2), expert_share=4 / 128),
)


@dataclass(frozen=True, slots=True)
class Shaped:
    """A checkpoint on disk, and its bytes by part."""

    shape: Shape
    folder: Path
    layers: tuple[int, ...]  # bytes of each
    routed: tuple[int, ...]  # of them, experts that a router chooses
    embed_bytes: int
    norm_bytes: int
    head_bytes: int  # 0: tied

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def weight_bytes(self, start: int, stop: int) -> int:
        """Of a stage; a tied head is a copy of the embedding where the stage has not that already."""
        total = sum(self.layers[start:stop])
        if start == 0:
            total += self.embed_bytes
        if stop == self.num_layers:
            total += self.norm_bytes + self.head_bytes
            total += self.embed_bytes if not self.head_bytes and start else 0
        return total

    def kv_bytes(self, start: int, stop: int, context: int, users: int) -> int:
        token_bytes = self.shape.cached * DTYPE_BITS[self.shape.dtype] // 8
        total = 0
        for layer in range(start, stop):
            window = self.shape.window(layer)
            tokens = 256 * math.ceil(context / 256)
            total += token_bytes * (tokens if window is None else min(tokens, window - 1 + 512))
        return total * users

    def decode_ms(self, start: int, stop: int, context: int, read_bytes_ms: float) -> float:
        """One step of one user at half the context, on a chip of the table."""
        token_bytes = self.shape.cached * DTYPE_BITS[self.shape.dtype] // 8
        nbytes = 0.0
        for layer in range(start, stop):
            seen = min(context // 2, self.shape.window(layer) or context)
            routed = self.routed[layer]
            nbytes += self.layers[layer] - routed * (1 - self.shape.expert_share) + token_bytes * seen
        if stop == self.num_layers:
            nbytes += self.norm_bytes + (self.head_bytes or self.embed_bytes)
        return nbytes / read_bytes_ms + 0.05 * (stop - start) + 0.3


def write_shaped(shape: Shape, folder: Path) -> Shaped:
    """The checkpoint in `folder`, as mlx-lm's convert would write it."""
    config: dict[str, Any] = {
        key: value
        for key, value in REAL_CONFIGS[shape.arch].items()
        if key not in {"quantization", "quantization_config"}
    }
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if shape.bits is not None:
        nn.quantize(model, group_size=64, bits=shape.bits, class_predicate=_can_be_packed)
        config["quantization"] = {"group_size": 64, "bits": shape.bits}
    tensors = {
        name: (shape.dtype if mx.issubdtype(value.dtype, mx.floating) else _NAMES[value.dtype], value.shape)
        for name, value in tree_flatten(model.parameters())
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, config, *_files(tensors))
    (folder / "config.json").write_text(json.dumps(config))
    return _shaped(shape, folder, tensors)


def _can_be_packed(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    return math.prod(entry[1]) * DTYPE_BITS[entry[0]] // 8


def _files(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room_bytes = FILE_BYTES
    for name, entry in tensors.items():
        if room_bytes < _nbytes(entry):
            files.append({})
            room_bytes = FILE_BYTES
        files[-1][name] = entry
        room_bytes -= _nbytes(entry)
    return files


def _shaped(shape: Shape, folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Shaped:
    num_layers = 1 + max(int(found[1]) for name in tensors if (found := _LAYER.search(name)))
    layers, routed = [0] * num_layers, [0] * num_layers
    rest = {"embed": 0, "norm": 0, "head": 0}
    for name, entry in tensors.items():
        found = _LAYER.search(name)
        if found is None:
            part = "head" if name.startswith("lm_head") else "embed" if "embed_tokens" in name else "norm"
            rest[part] += _nbytes(entry)
            continue
        layers[int(found[1])] += _nbytes(entry)
        if _EXPERTS.search(name):
            routed[int(found[1])] += _nbytes(entry)
    return Shaped(shape, folder, tuple(layers), tuple(routed), rest["embed"], rest["norm"], rest["head"])
