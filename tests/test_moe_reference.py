"""The specification of a block of experts: against numpy, and MLX's operations against it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.activations import SwigluOAI, swiglu
from mlx_lm.models.step3p5 import clamped_swiglu

from kernels import moe_ops, moe_reference
from kernels.moe import GEGLU, PLAIN, SWIGLU, Activation, BlockSpec, Experts, Format, Shared, supports
from tests.moe_blocks import block, error, routed, with_scores

AFFINE = Format(4, 32)
SPEC = BlockSpec(5, 64, 96, 3, AFFINE, Format(3, 32), Format(8, 32), SWIGLU, mx.float32)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpacked(form: Format, experts: Experts) -> np.ndarray:
    """Weights from their bits, by numpy: least significant bits first, rows of 32-bit words."""
    words = np.array(experts.weight)
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    numbers = stream.reshape(*words.shape[:2], -1, form.bits) @ (1 << np.arange(form.bits))
    scales = np.repeat(np.array(experts.scales), form.group_size, -1)
    if form.mode == "mxfp4":
        return FP4[numbers] * 2.0 ** (scales.astype(int) - 127)
    return numbers * scales + np.repeat(np.array(experts.biases), form.group_size, -1)


@pytest.mark.parametrize("form", [Format(bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + [Format(4, 32, "mxfp4")])
def test_weights_are_read_from_their_bits(form: Format) -> None:
    made = block(replace(SPEC, gate=form)).gate
    mine = np.stack([np.array(moe_reference.dequantized(form, made, e)) for e in range(5)])
    assert np.abs(mine - unpacked(form, made)).max() < 1e-6


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
    ):
        assert error(moe_reference.activate(activation, gate, up), wanted) < 1e-6, activation


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_mlx_operations_answer_as_the_reference(tokens: int) -> None:
    other = BlockSpec(1, 64, 32, 1, PLAIN, PLAIN, AFFINE, SWIGLU, mx.float32)
    made = with_scores(block(SPEC, has_bias=True, shared=other), tokens)
    x, indices, scores = routed(SPEC, tokens)
    weights = (made.gate, made.up, made.down)
    for given, shared in ((scores, made.shared), (scores, None), (None, None)):
        found = moe_ops.switch_glu(SPEC, x, indices, given, *weights, shared)
        wanted = moe_reference.switch_glu(SPEC, x, indices, given, *weights, shared)
        assert found.shape == wanted.shape
        assert error(found, wanted) < 1e-5
    for module in (moe_ops, moe_reference):
        with pytest.raises(ValueError, match="a shared expert needs scores"):
            module.switch_glu(SPEC, x, indices, None, *weights, made.shared)


def test_what_cannot_be_is_refused_by_name() -> None:
    for make, words in (
        (lambda: Format(7, 64), r"bits of an affine format are one of \(2, 3, 4, 5, 6, 8\), not 7"),
        (lambda: Format(4, 16), r"group_size of an affine format is one of \(32, 64, 128\), not 16"),
        (lambda: Format(4, 64, "mxfp4"), "mxfp4 has 4 bits in groups of 32, not 4 in 64"),
        (lambda: Format(4, 32, "plain"), "a plain format has bits 0 and group_size 0"),
        (lambda: Format(4, 32, "nf4"), 'mode is "affine", "mxfp4" or "plain", not "nf4"'),
        (lambda: Activation("relu"), 'not "relu"'),
        (lambda: Activation("swiglu_oai", limit=0.0), "limit of swiglu_oai must be above 0"),
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
