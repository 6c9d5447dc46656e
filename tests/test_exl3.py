"""EXL3 layers in MLX's own operations: the bits of the reference decoder, and its products."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kernels import exl3, exl3_ops
from kernels import exl3_reference as reference
from kernels.exl3 import Exl3Linear, Exl3Parts, Exl3SwitchLinear
from kernels.exl3_ops import Decoder
from kernels.exl3_reference import CODEBOOKS, Codebook
from tests.tiny_exl3 import random_tensors

RNG = np.random.default_rng(0)
KINDS: list[tuple[int, Codebook]] = [
    (3, "mcg"),
    (2, "3inst"),
    (3, "mcg"),
    (5, "mul1"),
    (2, "3inst"),
    (3, "3inst"),
]


def layer(
    shape: tuple[int, int], kind: tuple[int, Codebook], *, bias: bool, seed: int = 0
) -> tuple[Exl3Linear, Any]:
    """A layer with random tensors, and its weight and bias in float64."""
    num_out, num_in = shape
    tensors = random_tensors(shape, kind, seed=seed)
    made = Exl3Linear(num_in, num_out, *kind, bias=bias)
    for name in ("trellis", "suh", "svh"):
        assert made[name].shape == tensors[name].shape
        made[name] = mx.array(tensors[name])
    weight = reference.dense(tensors["trellis"], tensors["suh"], tensors["svh"], kind[1])[:num_out, :num_in]
    offset = RNG.standard_normal(num_out).astype(np.float16) if bias else np.zeros(num_out, np.float16)
    if bias:
        made.bias = mx.array(offset)
    return made, (weight, offset.astype(np.float64))


def experts(shape: tuple[int, int], kinds: list[tuple[int, Codebook]]) -> tuple[Exl3SwitchLinear, Any]:
    """As `layer`, for as many experts as kinds, with biases."""
    num_out, num_in = shape
    tensors = [random_tensors(shape, kind, seed=i) for i, kind in enumerate(kinds)]
    made = Exl3SwitchLinear(num_in, num_out, kinds, bias=True)
    made.trellis = [
        mx.stack([mx.array(t["trellis"]) for t, kind in zip(tensors, kinds, strict=True) if kind == own])
        for own in made.kinds
    ]
    made.suh, made.svh = (mx.array(np.stack([t[name] for t in tensors])) for name in ("suh", "svh"))
    offsets = RNG.standard_normal((len(kinds), num_out)).astype(np.float16)
    made.bias = mx.array(offsets)
    weights = [
        reference.dense(t["trellis"], t["suh"], t["svh"], book)[:num_out, :num_in]
        for t, (_, book) in zip(tensors, kinds, strict=True)
    ]
    return made, (np.stack(weights), offsets.astype(np.float64))


def worst(found: mx.array, expected: Any) -> float:
    got = np.array(found.astype(mx.float32), np.float64)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_decoded_weights_have_the_bits_of_the_reference(bits: int, codebook: Codebook) -> None:
    trellis = RNG.integers(-(1 << 15), 1 << 15, (2, 8, 8, 16 * bits), np.int16)
    found = np.array(exl3_ops.decode(mx.array(trellis), codebook))
    assert np.array_equal(found.view(np.uint16), reference.decode(trellis, codebook).view(np.uint16))


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (16, 1)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_layer_multiplies_with_the_weight_it_stands_for(shape: tuple[int, int], dtype: mx.Dtype) -> None:
    made, (weight, bias) = layer(shape, (3, "mcg"), bias=True)
    x = mx.array(RNG.standard_normal((2, 3, shape[1])).astype(np.float32)).astype(dtype)
    y = made(x)
    assert y.dtype == dtype
    expected = np.array(x.astype(mx.float32), np.float64) @ weight.T + bias
    assert worst(y, expected) < {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("block", [1 << 20, 1 << 15, 1 << 12])
def test_however_small_the_blocks_are_the_product_is_the_same(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(exl3, "PLAIN", Decoder(exl3_ops.decode, block, is_exact=True))
    made, (weight, bias) = layer((300, 200), (5, "mul1"), bias=True)
    x = RNG.standard_normal((4, 200)).astype(np.float32)
    assert worst(made(mx.array(x)), x @ weight.T + bias) < 1e-6


@pytest.mark.parametrize("kinds", [[(4, "3inst")] * 6, KINDS], ids=["alike", "mixed"])
@pytest.mark.parametrize(
    ("shape", "is_sorted"),
    [((1, 1, 2), False), ((1, 7, 3), False), ((40,), True)],
    ids=["one", "few", "sorted"],
)
@pytest.mark.parametrize("block", [1 << 20, 1 << 13])
def test_experts_multiply_as_those_of_mlx_lm_do(
    monkeypatch: pytest.MonkeyPatch,
    kinds: list[tuple[int, Codebook]],
    shape: tuple[int, ...],
    is_sorted: bool,
    block: int,
) -> None:
    monkeypatch.setattr(exl3, "PLAIN", Decoder(exl3_ops.decode, block, is_exact=True))
    made, (weights, biases) = experts((120, 200), kinds)
    chosen = RNG.integers(0, len(kinds), shape)
    chosen = np.sort(chosen) if is_sorted else chosen
    lead = shape if is_sorted else (*shape[:-1], 1)
    x = RNG.standard_normal((*lead, 1, 200)).astype(np.float32)
    y = made(mx.array(x), mx.array(chosen), sorted_indices=is_sorted)
    rows = np.broadcast_to(x, (*shape, 1, 200)).astype(np.float64)
    assert (
        worst(y, np.einsum("...mi,...oi->...mo", rows, weights[chosen]) + biases[chosen][..., None, :]) < 1e-6
    )


def test_a_layer_in_parts_has_their_outputs_side_by_side() -> None:
    one, (first, _) = layer((128, 128), (2, "mcg"), bias=False)
    two, (second, _) = layer((256, 128), (3, "mul1"), bias=False, seed=1)
    x = RNG.standard_normal((5, 128)).astype(np.float32)
    assert worst(Exl3Parts([one, two])(mx.array(x)), x @ np.concatenate([first, second]).T) < 1e-6


def test_parameters_are_the_tensors_of_the_checkpoint_and_none_is_trained() -> None:
    made = Exl3SwitchLinear(200, 120, KINDS, bias=True)
    names = [name for name, _ in tree_flatten(made.parameters())]
    assert names == [*(f"trellis.{i}" for i in range(4)), "suh", "svh", "bias"]
    assert not tree_flatten(made.trainable_parameters())
    assert str(made).startswith("Exl3SwitchLinear(6 experts of 200 -> 120, 3 bits mcg, 2 bits 3inst")
    assert str(Exl3Linear(200, 120, 3, "mcg")) == "Exl3Linear(200 -> 120, 3 bits, mcg)"


@pytest.mark.long
def test_a_call_keeps_nothing_decoded_and_needs_little_beside_the_tensors() -> None:
    made, _ = layer((2048, 1024), (3, "mcg"), bias=False)
    x = mx.array(RNG.standard_normal((1, 1024)).astype(np.float32))
    mx.eval(made.parameters(), x)
    mx.eval(made(x))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(made(x))
    assert mx.get_active_memory() - before < 1 << 16
    assert mx.get_peak_memory() - before < 36 * exl3_ops.PLAIN.block_weights
