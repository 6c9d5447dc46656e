"""Which forms of mlx-lm's expert layers the kernels know."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.deepseek_v41 import DeepseekV41SwiGLU
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.kimi_k3 import SiTU
from mlx_lm.models.step3p5 import ClampedSwiGLU

from kernels import expert_blocks, expert_form
from kernels.moe_spec import GEGLU, GELU, PLAIN, RELU2, SWIGLU, Activation, Format
from tests.test_switch import EXPERT, HIDDEN, NUM_EXPERTS, TOP_K, gateless_of, layer_of


@pytest.mark.parametrize(
    ("activation", "known"),
    [
        (GeGLU(), GEGLU),
        (SwigluOAI(), Activation("swiglu_oai", 1.702, 7.0)),
        (SwigluOAI(1.5, 6.0), Activation("swiglu_oai", 1.5, 6.0)),
        (DeepseekV41SwiGLU(10.0), Activation("swiglu_clamped", limit=10.0)),
        (DeepseekV41SwiGLU(0.0), SWIGLU),
        (ClampedSwiGLU(5.0), Activation("swiglu_clamped_after", limit=5.0)),
        (SiTU(), Activation("situ", 1.0)),
        (SiTU(2.0, 3.0), Activation("situ_both", 2.0, 3.0)),
        (nn.ReLU2(), "the activation ReLU2 has no kernel"),  # beside a gate
        (nn.SiLU(), "the activation SiLU has no kernel"),
    ],
)
def test_activations(activation: nn.Module, known: Activation | str) -> None:
    spec = expert_form.spec_of(layer_of(activation=activation), TOP_K, mx.float16)
    assert spec == known if isinstance(spec, str) else spec.activation == known


@pytest.mark.parametrize(
    ("activation", "known"),
    [
        (nn.ReLU2(), RELU2),
        (nn.GELU(approx="precise"), GELU),
        (nn.GELU(approx="tanh"), GELU),
        (nn.GELU(), "the activation GELU has no kernel"),
        (SwigluOAI(), "the activation SwigluOAI has no kernel"),
    ],
)
def test_activations_of_up_alone(activation: nn.Module, known: Activation | str) -> None:
    layer = gateless_of(activation=activation, bias=True)
    layer.fc1 = layer.fc1.to_quantized(16, 4, mode="nvfp4")
    spec = expert_form.spec_of(layer, TOP_K, mx.float16)
    assert spec == known if isinstance(spec, str) else spec.activation == known
    if not isinstance(spec, str):
        assert (spec.gate, spec.up, spec.down) == (None, Format(4, 16, "nvfp4"), PLAIN)
        assert (spec.num_experts, spec.hidden_size, spec.expert_size) == (NUM_EXPERTS, HIDDEN, EXPERT)


def test_formats() -> None:
    layer = layer_of(bias=True)
    plain = expert_form.spec_of(layer, TOP_K, mx.float16)
    assert not isinstance(plain, str)
    assert (plain.gate, plain.up, plain.down) == (PLAIN,) * 3
    layer.up_proj = layer.up_proj.to_quantized(32, 8)
    layer.down_proj = layer.down_proj.to_quantized(32, 4, mode="mxfp4")
    mixed = expert_form.spec_of(layer, TOP_K, mx.bfloat16)
    assert not isinstance(mixed, str)
    assert (mixed.up, mixed.down) == (Format(8, 32), Format(4, 32, "mxfp4"))
    assert (mixed.num_experts, mixed.hidden_size, mixed.expert_size) == (NUM_EXPERTS, HIDDEN, EXPERT)
    gate, up, down = expert_blocks.experts_of(layer)
    assert gate is not None
    assert (gate.scales, gate.bias is None, up.biases is None, down.biases) == (None, False, False, None)
    plain_gate = layer.gate_proj
    for form in (Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")):
        layer.gate_proj = plain_gate.to_quantized(form.group_size, form.bits, mode=form.mode)
        known = expert_form.spec_of(layer, TOP_K, mx.bfloat16)
        assert not isinstance(known, str)
        assert known.gate == form
    layer.gate_proj = plain_gate.to_quantized(16, 4, mode="nvfp4", global_scale=True)
    said = expert_form.spec_of(layer, TOP_K, mx.bfloat16)
    assert said == "nvfp4 with a scale of a whole matrix has no kernel"
