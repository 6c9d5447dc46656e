"""Quantised keys and values: which models' caches can be, and what they then take. Pure.

As mlx-lm does it (mlx_lm.models.cache.QuantizedKVCache, affine): groups of elements of a head share a scale
and a bias of the activations' dtype. A prompt's first chunk is read with plain caches and quantised
afterwards, which is what mlx-lm's `quantized_kv_start=0` means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.kv_profile import CacheProfile
from planner.model_profile import ModelProfile

KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)  # that MLX's kernels have


class KvQuantizationError(ValueError):
    """A model whose caches cannot be quantised so; one sentence."""


@dataclass(frozen=True, slots=True)
class KvQuantization:
    """How. Raises ValueError for bits or a group size that there is not."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in KV_BITS:
            raise ValueError(f"kv_bits = {self.bits} must be one of {', '.join(map(str, KV_BITS))}")
        if self.group_size not in KV_GROUP_SIZES:
            sizes = ", ".join(map(str, KV_GROUP_SIZES))
            raise ValueError(f"kv_group_size = {self.group_size} must be one of {sizes}")

    def nbytes(self, elements: int, dtype_bytes: int) -> int:
        """Bytes of `elements` elements of activations of `dtype_bytes` each."""
        return elements * self.bits // 8 + elements // self.group_size * 2 * dtype_bytes


def quantize_kv(model: ModelProfile, kv: KvQuantization) -> ModelProfile:
    """The model with quantised caches; states of fixed size stay as they are.

    Raises KvQuantizationError where mlx-lm has no quantised form of a layer's cache.
    """
    for index, layer in enumerate(model.layers):
        if layer.cache.window is not None:
            raise KvQuantizationError(
                f"layer {index} of {model.name} keeps a sliding window of {layer.cache.window} tokens "
                f"(RotatingKVCache), which cannot be quantised; use kv_bits null"
            )
        if layer.cache.is_latent:
            raise KvQuantizationError(
                f"layer {index} of {model.name} keeps a compressed latent (multi-head latent attention), "
                "which cannot be quantised; use kv_bits null"
            )
    if not any(layer.cache.token_bytes for layer in model.layers):
        raise KvQuantizationError(
            f"{model.name} keeps states of a fixed size and no keys and values (KVCache), so there is "
            "nothing to quantise; use kv_bits null"
        )
    if model.head_dim % kv.group_size and not any(layer.cache.is_expanded for layer in model.layers):
        raise KvQuantizationError(
            f"the heads of {model.name} have {model.head_dim} elements, which are no groups of "
            f"{kv.group_size}; use another kv_group_size, or kv_bits null"
        )
    layers = tuple(
        replace(layer, cache=_quantized(layer.cache, kv, model.dtype_bytes)) for layer in model.layers
    )
    return replace(model, layers=layers)


def _quantized(cache: CacheProfile, kv: KvQuantization, dtype_bytes: int) -> CacheProfile:
    if not cache.token_bytes:
        return cache
    return replace(
        cache,
        token_bytes=kv.nbytes(cache.token_bytes // dtype_bytes, dtype_bytes),
        plain_token_bytes=cache.token_bytes,
    )
