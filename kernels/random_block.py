"""Expert layers of a given form with random weights, made packed as they are stored. For who owns MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.step3p5 import ClampedSwiGLU
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear

from kernels.moe_spec import Activation, BlockSpec, Format

_MXFP4_BIAS = 127  # of a scale's exponent


def random_layer(spec: BlockSpec, *, has_bias: bool = False, seed: int = 0) -> nn.Module:
    """mlx-lm's own SwitchGLU of this form, evaluated; scales and biases have spec.dtype."""
    key = mx.random.key(seed)
    layer = SwitchGLU(8, 8, 1, activation=activation_of(spec.activation))
    up, down = (spec.expert_size, spec.hidden_size), (spec.hidden_size, spec.expert_size)
    for name, form, sizes in (
        ("gate_proj", spec.gate, up),
        ("up_proj", spec.up, up),
        ("down_proj", spec.down, down),
    ):
        key, own = mx.random.split(key)
        layer[name] = _projection(form, (spec.num_experts, *sizes), spec.dtype, own)
        if has_bias:
            layer[name].bias = (
                mx.random.normal((spec.num_experts, sizes[0]), key=own).astype(spec.dtype) * 0.1
            )
        mx.eval(layer[name].parameters())
    layer.eval()
    return layer


def _projection(form: Format, shape: tuple[int, int, int], dtype: mx.Dtype, key: mx.array) -> Any:
    """Weights (E, N, K) of about 1 / sqrt(K)."""
    num_experts, num_out, width = shape
    if form.mode == "plain":
        plain = SwitchLinear(8, 8, 1, bias=False)
        plain.weight = (mx.random.uniform(-1, 1, shape, dtype=mx.float16, key=key) * width**-0.5).astype(
            dtype
        )
        return plain
    made: Any = QuantizedSwitchLinear(32, 32, 1, bias=False, group_size=32, bits=4)
    made.group_size, made.bits, made.mode = form.group_size, form.bits, form.mode
    words = (num_experts, num_out, width * form.bits // 32)
    made.weight = mx.random.randint(0, 1 << 32, words, dtype=mx.uint32, key=key)
    groups = (num_experts, num_out, width // form.group_size)
    if form.mode == "affine":
        size = width**-0.5 * 2 / (1 << form.bits)
        made.scales = mx.random.uniform(size / 2, size, groups, key=key).astype(dtype)
        made.biases = made.scales * -(1 << (form.bits - 1))
    else:
        exponent = _MXFP4_BIAS - (width.bit_length() + 1) // 2 - 2
        made.scales = mx.full(groups, exponent, dtype=mx.uint8)
        made.biases = None
    return made


def activation_of(activation: Activation) -> nn.Module:
    """mlx-lm's module that joins gate and up so."""
    if activation.kind == "swiglu":
        return SwiGLU()
    if activation.kind == "geglu":
        return GeGLU()
    if activation.kind == "swiglu_oai":
        return SwigluOAI(activation.alpha, activation.limit)
    if activation.kind == "swiglu_clamped_after":
        return ClampedSwiGLU(activation.limit)
    from mlx_lm.models.deepseek_v41 import DeepseekV41SwiGLU

    return DeepseekV41SwiGLU(activation.limit)
