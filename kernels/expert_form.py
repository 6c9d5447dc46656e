"""The form of an expert layer of mlx-lm as the kernels know it: sizes, formats, activation. Values only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from kernels import moe
from kernels.expert_blocks import projections
from kernels.moe_spec import GEGLU, GELU, PLAIN, RELU2, SWIGLU, Activation, BlockSpec, Format

# What joins gate and up in mlx-lm, or takes up alone, by the qualified name of its class below mlx_lm.models;
# None: not this one of its forms.
_ACTIVATIONS: dict[str, Callable[[Any], Activation | None]] = {
    "switch_layers.SwiGLU": lambda _: SWIGLU,
    "muse_spark.PreciseSwiGLU": lambda _: SWIGLU,  # in float32, as the kernels have it anyway
    "gemma4_text.GeGLU": lambda _: GEGLU,
    "activations.SwigluOAI": lambda a: Activation("swiglu_oai", a._alpha, a._limit),
    "deepseek_v41.DeepseekV41SwiGLU": lambda a: (
        Activation("swiglu_clamped", limit=a.limit) if a.limit > 0 else SWIGLU
    ),
    "step3p5.ClampedSwiGLU": lambda a: Activation("swiglu_clamped_after", limit=a.limit),
    "kimi_k3.SiTU": lambda a: (
        Activation("situ", a.beta)
        if a.linear_beta is None
        else Activation("situ_both", a.beta, a.linear_beta)
    ),
    "mlx.nn.layers.activations.ReLU2": lambda _: RELU2,
    "mlx.nn.layers.activations.GELU": lambda a: GELU if a._approx in {"precise", "tanh"} else None,
}


def spec_of(layer: Any, top_k: int, dtype: mx.Dtype) -> BlockSpec | str:
    """The form of a layer's block for x of `dtype`, or why the kernels do not know it; one sentence."""
    made = projections(layer)
    up = made["up"]
    try:
        activation = _activation(layer.activation, has_gate="gate" in made)
        formats = {name: format_of(part) for name, part in made.items()}
        spec = BlockSpec(
            num_experts=int(up.num_experts),
            hidden_size=int(up.input_dims),
            expert_size=int(up.output_dims),
            top_k=top_k,
            gate=formats.get("gate"),
            up=formats["up"],
            down=formats["down"],
            activation=activation,
            dtype=dtype,
        )
    except ValueError as error:
        return str(error)
    return moe.supports(spec) or spec


def _activation(module: Any, *, has_gate: bool) -> Activation:
    """Raises ValueError for one that the kernels do not know."""
    kind = type(module)
    make = _ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix("mlx_lm.models."))
    known = None if make is None else make(module)
    if known is None or known.has_gate != has_gate:
        raise ValueError(f"the activation {kind.__name__} has no kernel")
    return known


def activation_of(layer: Any) -> Activation | None:
    """What joins gate and up in a layer, where the kernels know it."""
    try:
        return _activation(layer.activation, has_gate="gate" in projections(layer))
    except ValueError:
        return None


def format_of(projection: Any) -> Format:
    """Of a layer's or a shared expert's matrix. Raises ValueError for one that the kernels do not know."""
    if type(projection) in (SwitchLinear, nn.Linear):
        return PLAIN
    if type(projection) not in (QuantizedSwitchLinear, nn.QuantizedLinear):
        raise ValueError(f"a {type(projection).__name__} has no kernel")
    if projection.get("global_scale") is not None:
        raise ValueError(f"{projection.mode} with a scale of a whole matrix has no kernel")
    return Format(projection.bits, projection.group_size, projection.mode)
