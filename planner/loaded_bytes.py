"""Bytes of each tensor in memory once it is loaded: widened, cast or quantised. Pure, from headers.

Which linears are quantised, and which of them with 8 bits, is decided by mlx-lm's models
(`quant_predicate`); the names here say the same where it weighs anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from planner.exl3 import bits_of
from planner.headers import DTYPE_BITS, ModelFilesError, TensorHeader
from planner.kv_profile import LATENT_TYPES
from planner.load_options import LoadOptions, Quantization, is_packed

_CAST_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_FLOATS = ("F16", "BF16", "F32", "F8_E4M3")
_ROUTER = re.compile(r"(router(\.(gate|proj|layer))?|\.gate(\.gate_proj|\.proj)?|classifier)\.weight$")
_NOT_LINEAR = re.compile(r"conv|norm|e_score|\.A_log|\.dt_bias|rotary|\.bias$|res_proj|position_ids")
_EIGHT_BITS = Quantization(8, 64)
_NONE = re.compile(r"(?!)")
_DECODED = re.compile(r"kv_b_proj\.weight$")  # where attention takes it apart
# Model type -> what is packed with 8 bits whatever is asked for, and what is not packed.
_EXCEPTIONS: dict[str, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "granite": (re.compile(r"(self_attn\.o_proj|mlp\.down_proj|^lm_head)\.weight$"), _NONE),
    "granitemoe": (re.compile(r"(self_attn\.o_proj|mlp\.down_proj|^lm_head)\.weight$"), _NONE),
    "rwkv7": (re.compile(r"lora\.2|embeddings"), _NONE),
    "bailing_hybrid": (_NONE, re.compile(r"attention\.(kv_b_proj|embed_q|unembed_out)")),
    "bailing_moe_v3": (
        _NONE,
        re.compile(
            r"word_embeddings|^lm_head|attention\.(q_a_proj|q_b_proj|kv_a_proj|kv_b_proj|embed_q|unembed|b_proj)"
        ),
    ),
    "muse_spark": (_NONE, re.compile(r"^(?!.*mlp\.experts)")),
}


class LoadedBytes:
    """Bytes in memory, and numbers of weights, of a checkpoint's tensors under given options.

    Raises ModelFilesError where the checkpoint is quantised already and the options ask for it again.
    """

    def __init__(
        self,
        headers: Mapping[str, TensorHeader],
        config: Mapping[str, Any],
        name: str,
        options: LoadOptions,
    ) -> None:
        self._headers, self._quantize = headers, options.quantize
        found = config.get("quantization") or config.get("quantization_config")
        self._quantization: Mapping[str, Any] = found if isinstance(found, dict) else {}
        self._cast_to = options.cast_to(config)
        self._eight, self._kept = _EXCEPTIONS.get(str(config.get("model_type")), (_NONE, _NONE))
        self._decoded = _DECODED if config.get("model_type") in LATENT_TYPES else _NONE
        if options.quantize is not None and (
            is_packed(config)
            or any(tensor.endswith(".scales") or bits_of(h.dtype) for tensor, h in headers.items())
        ):
            raise ModelFilesError(
                f"{name} is quantised already: remove load.quantize, or name the model it was made from"
            )

    @property
    def cast_bytes(self) -> int | None:
        """Bytes of one float that is not quantised; None: as in the files."""
        return None if self._cast_to is None else _CAST_BYTES[self._cast_to]

    def nbytes(self, headers: Iterable[TensorHeader]) -> int:
        """Of several tensors together."""
        return sum(self.bytes_of(header) for header in headers)

    def bytes_of(self, header: TensorHeader) -> int:
        """fp8 weights with block scales are widened to bf16, their scales dropped.

        EXL3 weights of which the model computes others are decoded to float16.
        """
        if bits_of(header.dtype) and self._decoded.search(header.name):
            return math.prod(header.shape) * (self.cast_bytes or 2)
        if header.name.endswith("_scale_inv") or header.dtype not in _FLOATS:
            return 0 if header.name.endswith("_scale_inv") else header.nbytes
        is_widened = f"{header.name}_scale_inv" in self._headers
        if header.dtype == "F8_E4M3" and not is_widened:
            return header.nbytes
        item_bytes = self.cast_bytes or (2 if is_widened else DTYPE_BITS[header.dtype] // 8)
        count = math.prod(header.shape)
        how = self._packing(header)
        return count * item_bytes if how is None else how.packed_bytes(count, item_bytes)

    def params_of(self, header: TensorHeader) -> int:
        """Weights of a matrix; 0 for scales, biases, norms and other vectors."""
        if len(header.shape) < 2 or header.name.endswith((".scales", ".biases", "_scale_inv", ".scale")):
            return 0
        count = math.prod(header.shape)
        if header.dtype != "U32":
            return count
        path = header.name.removesuffix(".weight")
        scales = self._headers.get(f"{path}.scales")
        if scales is None:
            return count * 8  # 4 bits
        own = self._quantization.get(path)
        group = (own if isinstance(own, dict) else self._quantization).get("group_size", 64)
        return count // header.shape[-1] * scales.shape[-1] * int(group)

    def format_of(self, header: TensorHeader) -> str:
        """How the weights that a tensor belongs to are stored in memory, as planner.speeds names it.

        Scales and biases are of their matrix's format, vectors of their own.
        """
        bits = bits_of(header.dtype)
        if bits:
            is_decoded = self._decoded.search(header.name)
            return (self._cast_to or "float16") if is_decoded else f"exl3/{bits}"
        path, _, leaf = header.name.rpartition(".")
        weight = self._headers.get(f"{path}.weight", header) if leaf in ("scales", "biases") else header
        how = self._packing(weight) if weight.dtype in _FLOATS else None
        if how is not None:
            scales = self._cast_to or _NAMES.get(weight.dtype, "bfloat16")
            return _format_name(how.mode, how.bits, how.group_size, scales)
        if weight.dtype == "U32" or weight.name.endswith(("_blocks", "_scales")):
            return self._packed_format(weight)
        if self._cast_to is not None and weight.dtype in _FLOATS:
            return self._cast_to
        return "bfloat16" if f"{weight.name}_scale_inv" in self._headers else _NAMES.get(weight.dtype, "")

    def _packed_format(self, header: TensorHeader) -> str:
        """Of a tensor that is quantised in the file; config.json may name another packing for one path."""
        if header.dtype != "U32":
            return "mxfp4"  # as published: blocks and scales of 8 bits
        path = header.name.removesuffix(".weight")
        own = self._quantization.get(path)
        found = own if isinstance(own, dict) else self._quantization
        mode = str(found.get("mode", self._quantization.get("mode", "affine")))
        group = int(found.get("group_size", 64))
        params, words = self.params_of(header), math.prod(header.shape)
        bits = round(32 * words / params) if params else int(found.get("bits", 4))
        scales = self._headers.get(f"{path}.scales")
        dtype = self._cast_to or _NAMES.get(scales.dtype if scales else "", "bfloat16")
        return _format_name(mode, bits, group, dtype)

    def _packing(self, header: TensorHeader) -> Quantization | None:
        """How this tensor is quantised on load, or None."""
        wanted, name = self._quantize, header.name
        if wanted is None or len(header.shape) < 2 or _NOT_LINEAR.search(name):
            return None
        if self._kept.search(name):
            return None
        if not name.endswith(".weight") and "experts" not in name:
            return None
        if header.shape[-1] % wanted.group_size:
            return None
        if _ROUTER.search(name):
            stem = name.removesuffix(".weight")
            has_bias = any(f"{stem}.{key}" in self._headers for key in ("e_score_correction_bias",))
            return None if has_bias else _EIGHT_BITS
        if self._eight.search(name):
            return _EIGHT_BITS
        return wanted


def _format_name(mode: str, bits: int, group_size: int, scales: str) -> str:
    """Affine weights are multiplied in their scales' dtype; on a CPU the speed depends on it."""
    if mode != "affine":
        return mode
    return f"affine{bits}/{group_size}" + ("" if scales == "bfloat16" else f"+{scales}")
