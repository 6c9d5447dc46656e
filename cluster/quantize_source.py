"""The model that is to be quantised: its plain weights behind mlx-lm's modules, whatever form the folder
has.

A folder may hold plain weights, MLX's affine ones of 8 bits, or (for the affine format) EXL3. Nothing is
evaluated here: weights come from their files when they are used. Main thread only, which owns MLX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import dequantize_model, load_model

from cluster.errors import EXIT_USAGE, UserError
from kernels import exl3_ops
from kernels.exl3_reference import Codebook
from planner.exl3 import BLOCK, CODEBOOK_LEAVES, LEAVES, exl3_bits, is_exl3, paths
from planner.headers import ModelFilesError, TensorHeader, read_config, read_headers
from planner.model_profile import read_model_profile

_MAX_WHY = 300  # characters: mlx-lm names every tensor, a line for each
MIN_AFFINE_BITS = 8  # of a source: fewer have lost what a second quantisation would build on


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that may be quantised. headers: of all tensors. affine: None for plain weights."""

    folder: Path
    config: dict[str, Any]
    headers: Mapping[str, TensorHeader]
    affine: Mapping[str, Any] | None
    is_exl3: bool

    @property
    def plain_config(self) -> dict[str, Any]:
        """config.json without what says how the weights are stored."""
        gone = ("quantization", "quantization_config")
        return {key: value for key, value in self.config.items() if key not in gone}

    @property
    def stored(self) -> str:
        """How its weights are stored, as "affine, 8 bits"."""
        if self.affine is not None:
            return f"affine, {self.affine.get('bits')} bits"
        return f"EXL3, {exl3_bits(self.config)} bits" if self.is_exl3 else "not quantised"


def read_source(folder: Path, *, is_for_exl3: bool) -> Source:
    """Raises UserError for a folder without a model, or with one that is quantised already."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: name the folder of a model, with config.json in it", EXIT_USAGE
        )
    try:
        config, headers = read_config(folder), read_headers(folder)
    except ModelFilesError as error:
        raise UserError(f"{folder} is not a model folder: {error}", EXIT_USAGE) from None
    if is_exl3(config):
        if is_for_exl3:
            raise UserError(
                f"{folder} is quantised already, to EXL3: start from the model it was made of", EXIT_USAGE
            )
        try:
            read_model_profile(folder, str(folder))  # which sees more than mlx-lm would say
        except ModelFilesError as error:
            raise UserError(str(error), EXIT_USAGE) from None
        return Source(folder, config, headers, None, True)
    affine = config.get("quantization")
    other = config.get("quantization_config")
    if affine is None and other is not None:
        method = other.get("quant_method", "another format") if isinstance(other, dict) else "another format"
        raise UserError(
            f"{folder} is quantised already, to {method}: start from the model it was made of", EXIT_USAGE
        )
    if affine is not None and not isinstance(affine, dict):
        raise UserError(
            f'the "quantization" in {folder / "config.json"} says nothing that macrame knows of how its '
            "weights are quantised: start from the model it was made of",
            EXIT_USAGE,
        )
    if affine is not None:
        least = min(
            [
                affine.get("bits", 0),
                *(v["bits"] for v in affine.values() if isinstance(v, dict) and "bits" in v),
            ]
        )
        if affine.get("mode", "affine") != "affine" or least < MIN_AFFINE_BITS:
            raise UserError(
                f"{folder} is quantised already, to {least} bits: start from the model it was made of, or "
                "from one of 8 bits",
                EXIT_USAGE,
            )
    return Source(folder, config, headers, affine, False)


def load_plain(source: Source) -> nn.Module:
    """The whole model with lazy plain weights. Raises UserError for an architecture that mlx-lm has not."""
    try:
        if source.is_exl3:
            return _load_exl3(source)
        model, _ = load_model(source.folder, lazy=True)
    except (ValueError, FileNotFoundError) as error:
        why = shorten(str(error), _MAX_WHY, placeholder=" ...")
        raise UserError(f"{source.folder} cannot be loaded by mlx-lm: {why}", EXIT_USAGE) from None
    return dequantize_model(model) if source.affine is not None else model


def _load_exl3(source: Source) -> nn.Module:
    from mlx_lm.utils import _get_classes

    weights: dict[str, mx.array] = {}
    for file in sorted({header.file for header in source.headers.values()}):
        weights |= mx.load(str(source.folder / file))  # type: ignore[arg-type]
    dtype = _main_dtype(weights, paths(weights))
    for path in paths(weights):
        parts = {leaf: weights.pop(f"{path}.{leaf}") for leaf in LEAVES if f"{path}.{leaf}" in weights}
        named = [leaf for leaf in CODEBOOK_LEAVES if leaf in parts]
        codebook: Codebook = "mcg" if named == ["mcg"] else "mul1" if named == ["mul1"] else "3inst"
        suh, svh = (parts[f"{s}h"] if f"{s}h" in parts else exl3_ops.signs(parts[s]) for s in ("su", "sv"))
        weights[f"{path}.weight"] = exl3_ops.dense(parts["trellis"], suh, svh, codebook).astype(dtype)
    model_class, arguments = _get_classes(config=source.plain_config)
    model: nn.Module = model_class(arguments.from_dict(source.plain_config))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    shapes = {name: array.shape for name, array in _flat(model).items()}
    weights = {name: _cropped(array, shapes.get(name, array.shape)) for name, array in weights.items()}
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    return model


def _main_dtype(weights: Mapping[str, mx.array], encoded: Iterable[str]) -> mx.Dtype:
    """Of the largest plain weight, the embedding: linears of another dtype make MLX widen to float32."""
    own = tuple(f"{path}." for path in encoded)
    plain = [
        a for name, a in weights.items() if mx.issubdtype(a.dtype, mx.floating) and not name.startswith(own)
    ]
    return max(plain, key=lambda array: array.size).dtype if plain else mx.float16


def _flat(model: nn.Module) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def _cropped(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Without the padding of EXL3; what differs by more stays, for mlx-lm to refuse."""
    padded = tuple(-(-size // BLOCK) * BLOCK for size in shape[-2:])
    if array.ndim != len(shape) or array.shape[-2:] != padded:
        return array
    return array[tuple(slice(0, size) for size in shape)]
