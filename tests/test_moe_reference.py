"""The specification of a block of experts: against numpy, and MLX's operations against it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.activations import SwigluOAI, swiglu
from mlx_lm.models.kimi_k3 import SiTU
from mlx_lm.models.step3p5 import clamped_swiglu

from kernels import moe_ops, moe_reference
from kernels.moe import (
    GEGLU,
    GELU,
    PLAIN,
    RELU2,
    SWIGLU,
    Activation,
    BlockSpec,
    Experts,
    Format,
    Shared,
    supports,
)
from kernels.moe_spec import FLOATS
from tests.moe_blocks import block, error, routed, with_scores

AFFINE = Format(4, 32)
SPEC = BlockSpec(5, 64, 96, 3, AFFINE, Format(3, 32), Format(8, 32), SWIGLU, mx.float32)
GATELESS = replace(SPEC, gate=None, up=Format(4, 16, "nvfp4"), down=Format(8, 32, "mxfp8"), activation=RELU2)
FLOAT_FORMATS = [Format(*FLOATS[mode], mode) for mode in FLOATS]
_E4M3 = [(code // 8, code % 8) for code in range(128)]  # exponent and mantissa; the last is its NaN
_POSITIVE = [(8 * (e > 0) + m) * 2.0 ** (max(e, 1) - 10) for e, m in _E4M3[:-1]]
FP8 = np.array([*_POSITIVE, np.nan, *(-value for value in _POSITIVE), np.nan])
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpacked(form: Format, experts: Experts) -> np.ndarray:
    """Weights from their bits, by numpy: least significant bits first, rows of 32-bit words."""
    words = np.array(experts.weight)
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    numbers = stream.reshape(*words.shape[:2], -1, form.bits) @ (1 << np.arange(form.bits))
    scales = np.repeat(np.array(experts.scales), form.group_size, -1)
    if form.mode != "affine":
        values = FP8[numbers] if form.mode == "mxfp8" else FP4[numbers]
        return values * (FP8[scales] if form.mode == "nvfp4" else 2.0 ** (scales.astype(int) - 127))
    return numbers * scales + np.repeat(np.array(experts.biases), form.group_size, -1)


@pytest.mark.parametrize("form", [Format(bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + FLOAT_FORMATS)
def test_weights_are_read_from_their_bits(form: Format) -> None:
    made = block(replace(SPEC, gate=form)).gate
    mine = np.stack([np.array(moe_reference.dequantized(form, made, e)) for e in range(5)])
    assert np.abs(mine - unpacked(form, made)).max() < 1e-6


@pytest.mark.parametrize("form", FLOAT_FORMATS, ids=str)
def test_floats_are_those_that_mlx_writes(form: Format) -> None:
    """Each number comes back with no more than half a step lost, where its group's largest is its scale."""
    weight = mx.random.normal((3, 4, 64), key=mx.random.key(1))
    packed, scales = mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)
    found = np.stack([moe_reference.dequantized(form, Experts(packed, scales), e) for e in range(3)])
    assert np.abs(found - unpacked(form, Experts(packed, scales))).max() < 1e-6
    assert np.abs(found - np.array(weight)).max() < (0.2 if form.bits == 8 else 0.8)
    assert not np.isnan(found).any()


def test_the_reference_is_a_loop_over_tokens_and_experts() -> None:
    made = block(SPEC, has_bias=True)
    x, indices, scores = routed(SPEC, 4)
    gate, up, down = (
        unpacked(form, part)
        for form, part in ((SPEC.gate, made.gate), (SPEC.up, made.up), (SPEC.down, made.down))
    )
    wanted = np.zeros((4, 64))
    for token, expert, score in zip(
        np.repeat(np.arange(4), 3), np.array(indices).flat, np.array(scores).flat, strict=True
    ):
        row = np.array(x)[token]
        g = gate[expert] @ row + np.array(made.gate.bias)[expert]
        u = up[expert] @ row + np.array(made.up.bias)[expert]
        inner = g / (1 + np.exp(-g)) * u
        wanted[token] += score * (down[expert] @ inner + np.array(made.down.bias)[expert])
    found = moe_reference.switch_glu(SPEC, x, indices, scores, made.gate, made.up, made.down)
    assert np.abs(np.array(found) - wanted).max() < 1e-5


def test_activations_are_those_of_the_models() -> None:
    gate, up = mx.random.normal((2, 500)) * 6, mx.random.normal((2, 500)) * 6
    for activation, wanted in (
        (SWIGLU, swiglu(gate, up)),
        (GEGLU, nn.gelu_approx(gate) * up),
        (Activation("swiglu_oai", 1.5, 3.0), SwigluOAI(1.5, 3.0)(up, gate)),
        (Activation("swiglu_clamped", limit=4.0), swiglu(mx.minimum(gate, 4.0), mx.clip(up, -4.0, 4.0))),
        (Activation("swiglu_clamped_after", limit=2.0), clamped_swiglu(up, gate, 2.0)),
        (Activation("situ", 2.5), SiTU(2.5)(up, gate)),
        (Activation("situ_both", 2.5, 3.0), SiTU(2.5, 3.0)(up, gate)),
    ):
        assert error(moe_reference.activate(activation, gate, up), wanted) < 1e-6, activation
    for alone, wanted in ((RELU2, nn.ReLU2()(up)), (GELU, nn.GELU(approx="precise")(up))):
        assert error(moe_reference.activate(alone, None, up), wanted) < 1e-6, alone


@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.parametrize("spec", [SPEC, GATELESS], ids=["gate", "gateless"])
def test_mlx_operations_answer_as_the_reference(spec: BlockSpec, tokens: int) -> None:
    other = BlockSpec(1, 64, 32, 1, PLAIN, PLAIN, AFFINE, SWIGLU, mx.float32)
    made = with_scores(block(spec, has_bias=True, shared=other), tokens)
    x, indices, scores = routed(spec, tokens)
    weights = (made.gate, made.up, made.down)
    for given, shared in ((scores, made.shared), (scores, None), (None, None)):
        found = moe_ops.switch_glu(spec, x, indices, given, *weights, shared)
        wanted = moe_reference.switch_glu(spec, x, indices, given, *weights, shared)
        assert found.shape == wanted.shape
        assert error(found, wanted) < 1e-5
    for module in (moe_ops, moe_reference):
        with pytest.raises(ValueError, match="a shared expert needs scores"):
            module.switch_glu(spec, x, indices, None, *weights, made.shared)


def test_what_cannot_be_is_refused_by_name() -> None:
    for make, words in (
        (lambda: Format(7, 64), r"bits of an affine format are one of \(2, 3, 4, 5, 6, 8\), not 7"),
        (lambda: Format(4, 16), r"group_size of an affine format is one of \(32, 64, 128\), not 16"),
        (lambda: Format(4, 64, "mxfp4"), "mxfp4 has 4 bits in groups of 32, not 4 in 64"),
        (lambda: Format(4, 32, "nvfp4"), "nvfp4 has 4 bits in groups of 16, not 4 in 32"),
        (lambda: Format(4, 32, "mxfp8"), "mxfp8 has 8 bits in groups of 32, not 4 in 32"),
        (lambda: Format(4, 32, "plain"), "a plain format has bits 0 and group_size 0"),
        (lambda: Format(4, 32, "nf4"), 'mode is one of affine, mxfp4, plain, nvfp4, mxfp8, not "nf4"'),
        (lambda: Activation("relu"), 'not "relu"'),
        (lambda: Activation("swiglu_oai", limit=0.0), "limit of swiglu_oai must be above 0"),
        (lambda: Activation("situ", alpha=0.0), "alpha of situ must be above 0"),
        (lambda: replace(SPEC, gate=None), "the activation swiglu joins gate and up: give it what it takes"),
        (lambda: replace(SPEC, activation=RELU2), "the activation relu2 takes up alone"),
        (lambda: replace(SPEC, top_k=0), "top_k must be at least 1, not 0"),
        (lambda: replace(SPEC, dtype=mx.int32), "dtype must be float16, bfloat16 or float32"),
        (lambda: Shared(SPEC, *[Experts(mx.zeros((1,)))] * 3), "a shared expert is a block of one expert"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_a_block_that_no_kernel_can_run_says_why() -> None:
    assert supports(SPEC) is None
    plain = replace(SPEC, gate=PLAIN, hidden_size=60)
    assert supports(plain) == "the gate and up matrices have rows of 60 weights, which is no multiple of 32"
    assert supports(GATELESS) is None
    odd = replace(GATELESS, hidden_size=72)
    assert supports(odd) == "the up matrix has rows of 72 weights, which is no multiple of 16"
    three = replace(SPEC, gate=Format(4, 16, "nvfp4"))  # 3 bits make whole words by 32, a group has 16
    assert supports(three) == (
        "the gate and up matrices have formats without a common number of weights in whole words of one group"
    )
    shared = replace(SPEC, num_experts=1, top_k=1)
    assert supports(GATELESS, shared) == "a shared expert has a kernel only where both have a gate"
