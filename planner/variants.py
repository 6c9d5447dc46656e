"""The same checkpoint at a lower precision, of its caches or of its weights: what a refusal may offer. Pure.

Weights are those that `mlx_lm.convert` would make, as in `macrame fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.headers import ModelFilesError, TensorHeader
from planner.kv_quant import KV_BITS, KvQuantization, KvQuantizationError, quantize_kv
from planner.load_options import is_packed
from planner.model_profile import ModelProfile, profile_model
from planner.precision import PRECISIONS, convert


@dataclass(frozen=True, slots=True)
class Variant:
    """One. `is_on_load`: the nodes can make it while they load; else the checkpoint must be made anew."""

    what: Literal["caches", "weights"]
    bits: int
    is_on_load: bool
    model: ModelProfile


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What variants are made of. `finish` adds what the nodes load besides, such as adapters."""

    config: dict[str, Any]
    headers: Mapping[str, TensorHeader]
    model: ModelProfile  # as it is planned, but for the caches' precision
    kv: KvQuantization | None = None
    finish: Callable[[ModelProfile], ModelProfile] = lambda model: model

    def variants(self) -> Iterator[Variant]:
        """Caches and then weights, each from the smallest loss to the largest; only what is smaller."""
        for bits in sorted(KV_BITS, reverse=True):
            if self.kv is None or bits < self.kv.bits:
                group_size = 64 if self.kv is None else self.kv.group_size
                model = _with_caches(self.model, KvQuantization(bits, group_size))
                if model is not None:
                    yield Variant("caches", bits, True, model)
        for precision in PRECISIONS:
            model = self._with_weights(precision.bits) if precision.bits else None
            if model is not None and model.full_bytes < self.model.full_bytes:
                yield Variant(
                    "weights",
                    precision.bits,
                    not is_packed(self.config),
                    _with_caches(model, self.kv) or model,
                )

    def _with_weights(self, bits: int) -> ModelProfile | None:
        """None where the headers do not tell."""
        config, headers, options = convert(self.config, self.headers, bits)
        try:
            lacks_head = not self.model.has_head
            return self.finish(
                profile_model(config, headers, self.model.name, options, can_lack_head=lacks_head)
            )
        except ModelFilesError:
            return None


def _with_caches(model: ModelProfile, kv: KvQuantization | None) -> ModelProfile | None:
    """None where this model's caches cannot be so."""
    try:
        return model if kv is None else quantize_kv(model, kv)
    except KvQuantizationError:
        return None
