"""EXL3 kernels in the emulator: the bits of the reference decoder, and its products."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import exl3_kernels
from kernels import exl3_reference as reference
from kernels.emulator import launch
from kernels.exl3 import Exl3SwitchLinear
from kernels.exl3_choice import Choice
from kernels.exl3_kernels import Matrix
from kernels.exl3_reference import CODEBOOKS, Codebook
from kernels.source import recorded
from tests.emulated import needs_compiler
from tests.test_exl3 import RNG, experts, layer, worst

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]
TOLERANCE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
IN_PLACE, IN_FLOAT16 = Choice(((1, 512, "in place"),)), Choice(((1, 0, "unpacked"),))


def unpacked(bits: int, codebook: Codebook, shape: tuple[int, ...] = (8, 8)) -> None:
    trellis = RNG.integers(-(1 << 15), 1 << 15, (*shape, 16 * bits), np.int16)
    nothing = mx.zeros(8, mx.float16)
    found = np.array(Matrix(mx.array(trellis), nothing, nothing, None, codebook, 0).unpacked())
    assert np.array_equal(found.view(np.uint16), reference.decode(trellis, codebook).view(np.uint16))


@pytest.mark.parametrize(("bits", "codebook"), [(3, "mcg")])
def test_unpacked_weights_have_the_bits_of_the_reference(bits: int, codebook: Codebook) -> None:
    unpacked(bits, codebook)


@pytest.mark.long
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_all_unpacked_weights_have_the_bits_of_the_reference(bits: int, codebook: Codebook) -> None:
    for order in launch.ORDERS:
        with launch.options(order=order):
            unpacked(bits, codebook, (2, 8, 16))
    with launch.options(mode="watched") as log:
        unpacked(bits, codebook, (2, 8, 16))
    read = log.launches[0].traffic["trellis"]
    assert read.touched_bytes == 2 * 8 * 16 * 32 * bits


def test_a_product_is_that_of_the_reference_and_one_launch() -> None:
    made, (weight, bias) = layer((300, 200), (3, "mcg"), bias=True)
    made.choice = IN_PLACE
    x = RNG.standard_normal((1, 1, 200)).astype(np.float32)
    with recorded() as calls:
        y = made(mx.array(x))
    assert [call.kernel.name for call in calls] == ["exl3_decode"]
    assert worst(y, x @ weight.T + bias) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (136, 1100)])
def test_products_are_the_same_in_every_order_and_near_the_reference(
    shape: tuple[int, int], bits: int
) -> None:
    codebook = CODEBOOKS[(bits + shape[0]) % 3]
    made, (weight, bias) = layer(shape, (bits, codebook), bias=True)
    for rows, dtype, choice in (
        (1, mx.float32, IN_PLACE),
        (2, mx.float16, IN_PLACE),
        (3, mx.bfloat16, IN_PLACE),
        (9, mx.float32, IN_PLACE),
        (11, mx.float16, IN_FLOAT16),
    ):
        made.choice = choice
        x = mx.array(RNG.standard_normal((rows, shape[1])).astype(np.float32)).astype(dtype)
        found = []
        for order in launch.ORDERS:
            with launch.options(order=order):
                found.append(made(x))
        assert all(mx.array_equal(one, found[0]) for one in found[1:])
        with launch.options(mode="watched"):
            assert mx.array_equal(made(x), found[0])
        expected = np.array(x.astype(mx.float32), np.float64) @ weight.T + bias
        assert worst(found[0], expected) < TOLERANCE[dtype]


def ask(
    made: Exl3SwitchLinear, weights: Any, biases: Any, shape: tuple[int, ...], *, is_shared: bool
) -> None:
    """Random choices of experts, with rows of their own or one for all choices of a token."""
    chosen = RNG.integers(0, made.num_experts, shape)
    lead = (*shape[:-1], 1) if is_shared else shape
    x = RNG.standard_normal((*lead, 1, made.input_dims)).astype(np.float32)
    y = made(mx.array(x), mx.array(chosen))
    rows = np.broadcast_to(x, (*shape, 1, made.input_dims)).astype(np.float64)
    assert (
        worst(y, np.einsum("...mi,...oi->...mo", rows, weights[chosen]) + biases[chosen][..., None, :]) < 1e-6
    )


@pytest.mark.long
def test_experts_of_one_token_take_one_launch() -> None:
    made, (weights, biases) = experts((120, 200), [(4, "3inst")] * 6)
    made.choice = IN_PLACE
    with recorded() as calls:
        ask(made, weights, biases, (1, 1, 2), is_shared=True)
    assert [call.kernel.name for call in calls] == ["exl3_decode"]


@pytest.mark.long
@pytest.mark.parametrize("shape", [(120, 200), (130, 1100)])
def test_experts_of_several_tokens_are_sorted_first(shape: tuple[int, int]) -> None:
    made, (weights, biases) = experts(shape, [(3, "mcg")] * 6)
    made.choice = IN_PLACE
    for order in launch.ORDERS:
        with launch.options(order=order), recorded() as calls:
            ask(made, weights, biases, (1, 5, 3), is_shared=True)
            ask(made, weights, biases, (2, 9, 4), is_shared=False)  # more rows of an expert than one tile has
            ask(made, weights, biases, (1, 1, 2), is_shared=False)
        assert [call.kernel.name for call in calls[:2]] == ["exl3_plan", "exl3_decode"]
    with launch.options(mode="watched"):
        ask(made, weights, biases, (1, 9, 2), is_shared=True)


@pytest.mark.long
@pytest.mark.parametrize("kinds", [[(3, "mcg")] * 6, [(3, "mcg"), (2, "mul1"), (3, "mcg"), (4, "3inst")]])
def test_experts_of_many_tokens_are_decoded_to_float16(kinds: list[tuple[int, Codebook]]) -> None:
    made, (weights, biases) = experts((120, 200), kinds)
    made.choice = IN_FLOAT16
    with recorded() as calls:
        ask(made, weights, biases, (1, 16, 3), is_shared=True)
    assert {call.kernel.name for call in calls} == {"exl3_unpack"}


@pytest.mark.parametrize("pairs", [15, 189])
def test_the_plan_sorts_pairs_and_cuts_them_into_tiles(pairs: int) -> None:
    flat = RNG.integers(0, 5, pairs) if pairs < 100 else np.full(pairs, 4)
    made = exl3_kernels.plan(mx.array(flat.astype(np.uint32)), 5)
    tiles = np.array(made.tiles)
    assert tiles[0, 0] <= made.room
    assert np.array(made.order)[:pairs].tolist() == np.argsort(flat, kind="stable").tolist()
    wanted = []
    for expert in np.unique(flat):
        first, count = int((flat < expert).sum()), int((flat == expert).sum())
        cuts = range(0, count, 32)
        wanted += [[int(expert), first + cut, min(32, count - cut), 0] for cut in cuts]
    assert tiles[1 : 1 + tiles[0, 0]].tolist() == wanted
