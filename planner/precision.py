"""A checkpoint's headers as they would be at another precision. Pure.

Quantised weights are traced back to bfloat16 matrices; what quantising those anew takes is the planner's own
arithmetic for quantising on load, whose rules are those of `mlx_lm.convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from planner.exl3 import bits_of, fold
from planner.headers import TensorHeader
from planner.load_options import LoadOptions, Quantization
from planner.model_profile import NO_OPTIONS

GROUP_SIZE = 64
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_QUANTIZATION_KEYS = ("quantization", "quantization_config")


@dataclass(frozen=True, slots=True)
class Precision:
    """bits 0: as stored; 16: bfloat16; else affine quantisation in so many."""

    name: str
    bits: int


AS_STORED = Precision("as stored", 0)
PRECISIONS = (
    AS_STORED,
    Precision("bf16", 16),
    Precision("8 bit", 8),
    Precision("6 bit", 6),
    Precision("4 bit", 4),
    Precision("3 bit", 3),
)


def convert(
    config: dict[str, Any], headers: Mapping[str, TensorHeader], bits: int
) -> tuple[dict[str, Any], dict[str, TensorHeader], LoadOptions]:
    """config.json, headers and how to load them so that the weights have `bits`, as in Precision."""
    if bits == 0:
        return config, dict(headers), NO_OPTIONS
    plain = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    options = NO_OPTIONS if bits == 16 else LoadOptions(Quantization(bits, GROUP_SIZE))
    return plain, _dequantized(config, headers), options


def num_params(config: dict[str, Any], headers: Mapping[str, TensorHeader]) -> int:
    """Parameters of the checkpoint, however they are stored."""
    return sum(prod(header.shape) for header in _dequantized(config, headers).values())


def _dequantized(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """One bfloat16 tensor for each quantised one, and all floats as bfloat16."""
    headers = fold(config, headers, "the checkpoint")
    found: dict[str, Any] = next(
        (config[key] for key in _QUANTIZATION_KEYS if isinstance(config.get(key), dict)), {}
    )
    whole = {}
    for name, header in headers.items():
        path, _, leaf = name.rpartition(".")
        scales = headers.get(f"{path}.scales")
        if name.endswith(("_scale_inv", "_scales")) or (
            leaf in ("scales", "biases") and f"{path}.weight" in headers
        ):
            continue
        if bits_of(header.dtype):
            whole[name] = _as_bf16(header, header.shape)
        elif header.dtype == "U32" and scales is not None:
            own = found.get(path)
            group = int((own if isinstance(own, dict) else found).get("group_size", GROUP_SIZE))
            whole[name] = _as_bf16(header, (*scales.shape[:-1], scales.shape[-1] * group))
        elif header.dtype == "U8" and name.endswith("_blocks"):  # mxfp4 as published: 16 bytes hold 32
            *rows, groups, nbytes = header.shape
            whole[name] = _as_bf16(header, (*rows, groups * nbytes * 2))
        else:
            whole[name] = _as_bf16(header, header.shape) if header.dtype in _FLOATS else header
    return whole


def _as_bf16(header: TensorHeader, shape: tuple[int, ...]) -> TensorHeader:
    return replace(header, dtype="BF16", shape=shape, nbytes=2 * prod(shape))
