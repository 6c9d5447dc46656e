"""A checkpoint's headers as they would be after a conversion to another precision. Pure.

As `mlx_lm.convert` does it: affine quantisation of every matrix whose rows are whole groups, a bfloat16 scale
and bias for each group; everything else becomes bfloat16. What a model's own rules keep at more bits (routers
of some) is not known here, so the sizes are estimates, a few tenths of a percent low for such models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from planner.headers import DTYPE_BITS, TensorHeader

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
) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """config.json and headers of the converted checkpoint; `bits` as in Precision."""
    if bits == 0:
        return config, dict(headers)
    plain = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    whole = _dequantized(config, headers)
    if bits == 16:
        return plain, whole
    found: dict[str, TensorHeader] = {}
    for header in whole.values():
        found |= {part.name: part for part in _quantized(header, bits)}
    return plain | {"quantization": {"group_size": GROUP_SIZE, "bits": bits}}, found


def num_params(config: dict[str, Any], headers: Mapping[str, TensorHeader]) -> int:
    """Parameters of the checkpoint, however they are stored."""
    return sum(prod(header.shape) for header in _dequantized(config, headers).values())


def _dequantized(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """One bfloat16 tensor for each quantised one, and all floats as bfloat16."""
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
        if header.dtype == "U32" and scales is not None:
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


def _quantized(header: TensorHeader, bits: int) -> list[TensorHeader]:
    """weight, scales and biases of a matrix; itself where it is none."""
    *rows, columns = header.shape or (0,)
    path, _, leaf = header.name.rpartition(".")
    is_matrix = len(header.shape) > 1 and header.dtype == "BF16" and columns % GROUP_SIZE == 0
    if not is_matrix or "conv" in header.name or "norm" in path.rpartition(".")[2] or leaf == "bias":
        return [header]
    stem = path if leaf == "weight" else header.name
    groups = (*rows, columns // GROUP_SIZE)
    return [
        _tensor(header, f"{stem}.weight", "U32", (*rows, columns * bits // 32)),
        _tensor(header, f"{stem}.scales", "BF16", groups),
        _tensor(header, f"{stem}.biases", "BF16", groups),
    ]


def _tensor(like: TensorHeader, name: str, dtype: str, shape: tuple[int, ...]) -> TensorHeader:
    return replace(like, name=name, dtype=dtype, shape=shape, nbytes=prod(shape) * DTYPE_BITS[dtype] // 8)
