"""What a node makes of a checkpoint while it loads it: quantised weights, another dtype. Pure values.

The rules are those of `mlx_lm.convert`, so that loading with these options equals loading its result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
# Mode -> group sizes and bits that MLX has, the default of each first (mlx.core.quantize).
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
# Packed formats of other tools; fp8 with block scales is not among them: it is widened on load.
_PACKED_METHODS = ("mxfp4", "mxfp8", "awq", "gptq", "bitnet", "compressed-tensors", "modelopt", "exl3")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How linears and embeddings are packed. Raises ValueError for what MLX does not have."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode = {self.mode!r} must be one of {', '.join(MODES)}")
        for key, value, allowed in (
            ("group_size", self.group_size, MODES[self.mode][0]),
            ("bits", self.bits, MODES[self.mode][1]),
        ):
            if value not in allowed:
                names = ", ".join(map(str, sorted(allowed)))
                rule = f"must be one of {names}" if len(allowed) > 1 else f"must be {names}"
                raise ValueError(f"{key} = {value} {rule} in the mode {self.mode}")

    @classmethod
    def of(cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> Quantization:
        """With MLX's defaults of the mode for what is not given."""
        sizes, widths = MODES.get(mode, ((0,), (0,)))
        return cls(widths[0] if bits is None else bits, sizes[0] if group_size is None else group_size, mode)

    def packed_bytes(self, count: int, scale_bytes: int) -> int:
        """Of `count` weights with their scales and biases; scale_bytes: of one affine scale."""
        per_group = 2 * scale_bytes if self.mode == "affine" else 1
        return count * self.bits // 8 + count // self.group_size * per_group


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to do with the weights of a checkpoint; None: keep them as they are."""

    quantize: Quantization | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} must be one of {', '.join(DTYPES)}")

    def cast_to(self, config: Mapping[str, Any]) -> str | None:
        """The dtype that floats which are not quantised get, or None to leave them.

        As `mlx_lm.convert` does: quantising casts to the dtype that config.json names, if it names one.
        """
        if self.dtype is not None or self.quantize is None:
            return self.dtype
        text = config.get("text_config")
        named = config.get("torch_dtype")
        if named is None and isinstance(text, dict):
            named = text.get("dtype")
        return named if named in DTYPES else None


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the checkpoint is quantised, in a form that mlx-lm keeps."""
    if config.get("quantization"):
        return True
    text = config.get("text_config")
    found = config.get("quantization_config")
    if found is None and isinstance(text, dict):
        found = text.get("quantization_config")
    if not isinstance(found, dict):
        return False
    if found.get("quant_method") == "fp8":
        return found.get("scale_fmt") == "ue8m0" and list(found.get("weight_block_size") or ()) == [32, 32]
    return found.get("quant_method") in (*_PACKED_METHODS, None)
