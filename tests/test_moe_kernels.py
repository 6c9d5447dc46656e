"""The kernels of a block of experts, emulated: answers, launches and bytes. Long: every format and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kernels import moe_reference
from kernels.emulator import launch
from kernels.moe import (
    GEGLU,
    GELU,
    PLAIN,
    RELU2,
    SWIGLU,
    Activation,
    BlockSpec,
    Format,
    num_launches,
    supports,
    switch_glu,
)
from kernels.moe_constants import chunk
from kernels.moe_spec import ACTIVATIONS
from kernels.source import recorded
from tests.emulated import needs_compiler
from tests.moe_blocks import Block, block, error, routed, with_scores

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

MOST = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: 5e-6}
FORMATS = [Format(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MXFP4, NVFP4, MXFP8 = Format(4, 32, "mxfp4"), Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")
EVERY = [*FORMATS, MXFP4, PLAIN, NVFP4, MXFP8]
MIXED = BlockSpec(5, 96, 72, 3, Format(3, 32), MXFP4, PLAIN, SWIGLU, mx.float16)


def run(made: Block, x: mx.array, indices: mx.array, scores: mx.array | None) -> mx.array:
    return switch_glu(made.spec, x, indices, scores, made.gate, made.up, made.down, made.shared)


def one_by_one(
    made: Block, x: mx.array, indices: mx.array, scores: mx.array | None, tokens: Sequence[int]
) -> mx.array:
    """Each of these tokens alone, by the kernels for one token."""
    answers = []
    for token in tokens:
        here = slice(token, token + 1)
        alone = made
        if made.shared is not None and made.shared.scores is not None:
            alone = replace(made, shared=replace(made.shared, scores=made.shared.scores[here]))
        answers.append(run(alone, x[here], indices[here], None if scores is None else scores[here]))
    return mx.concatenate(answers)


def check(made: Block, x: mx.array, indices: mx.array, scores: mx.array | None) -> float:
    """Right within the limit of its dtype, in the promised launches, the same bits as token by token."""
    spec, weights = made.spec, (made.gate, made.up, made.down)
    with recorded() as calls:
        found = run(made, x, indices, scores)
    assert len(calls) == num_launches(x.shape[0], is_summed=scores is not None)
    wanted = moe_reference.switch_glu(spec, x, indices, scores, *weights, made.shared)
    assert found.shape == wanted.shape
    assert found.dtype == spec.dtype
    off = error(found, wanted)
    assert off <= MOST[spec.dtype], (spec, x.shape[0], off)
    if x.shape[0] > 1:
        some = sorted({*range(0, x.shape[0], 1 + x.shape[0] // 5), x.shape[0] - 1})
        alone = one_by_one(made, x, indices, scores, some)
        assert mx.array_equal(found[mx.array(some)], alone), (spec, x.shape[0])
    return off


def test_one_token_and_a_few_in_mixed_formats() -> None:
    made = block(MIXED)
    for tokens in (1, 5):
        check(made, *routed(MIXED, tokens))
    x, indices, scores = routed(MIXED, 5)
    found = []
    for order in launch.ORDERS:
        with launch.options(order=order):
            found.append(run(made, x, indices, scores))
    assert mx.array_equal(found[0], found[1])
    assert mx.array_equal(found[0], found[2])


def test_up_alone_of_one_token_and_a_few() -> None:
    """The kernels of a block without a gate, in their own launches."""
    spec = replace(MIXED, gate=None, up=NVFP4, down=Format(4, 32), expert_size=96, activation=RELU2)
    made = block(spec)
    for tokens, names in (
        (1, ["moe_up", "moe_down_sum"]),
        (5, ["moe_up_batch", "moe_down_batch", "moe_sum"]),
    ):
        with recorded() as calls:
            check(made, *routed(spec, tokens))
        assert [call.kernel.name for call in calls][: len(names)] == names


def test_a_lane_takes_whole_words_of_one_group_and_few_lanes_idle() -> None:
    two, three, four, eight = (Format(bits, 64) for bits in (2, 3, 4, 8))
    for width, forms, most, wanted in (
        (2048, (four, four), 8, 8),
        (2048, (four,), 16, 16),
        (768, (four,), 16, 8),  # 16 would leave 16 lanes of 64 idle
        (2048, (eight,), 8, 8),
        (2048, (two,), 8, 16),  # 8 are no whole word
        (2048, (four, three), 8, 32),
        (96, (Format(2, 32),), 16, 16),
        (2048, (PLAIN,), 16, 8),  # 16 would be eight words of every row
        (72, (PLAIN,), 16, 4),
        (800, (PLAIN,), 8, 4),  # 8 would leave 28 lanes of 128 idle
        (96, (PLAIN, three), 16, 32),
        (60, (PLAIN,), 16, 4),
        (72, (PLAIN, three), 16, None),
        (2688, (NVFP4,), 8, 8),
        (1856, (NVFP4,), 16, 16),
        (1856, (MXFP8,), 16, 16),
        (2688, (NVFP4, three), 8, None),
    ):
        assert chunk(width, forms, mx.bfloat16, most) == wanted, (width, forms, most)
    assert chunk(72, (PLAIN,), mx.float32, 16) == 4


def test_what_no_kernel_fits_is_left_to_mlx_with_a_reason() -> None:
    for spec, reason in (
        (replace(MIXED, num_experts=3000), "3000 experts are more than 2048"),
        (replace(MIXED, top_k=31), "31 experts for each token are more than 30"),
        (replace(MIXED, expert_size=66), "the down matrix has rows of 66 weights, which is no multiple of 4"),
    ):
        assert supports(spec) == reason
    odd = BlockSpec(3, 64, 34, 2, PLAIN, PLAIN, PLAIN, SWIGLU, mx.float32)
    shared = BlockSpec(1, 64, 34, 1, PLAIN, PLAIN, PLAIN, SWIGLU, mx.float32)
    assert supports(replace(odd, expert_size=40), shared) == supports(odd)
    other = "the shared expert has another hidden size or dtype"
    assert supports(replace(odd, expert_size=40), replace(shared, hidden_size=32)) == other
    made, (x, indices, scores) = block(odd), routed(odd, 3)
    with recorded() as calls:
        found = run(made, x, indices, scores)
    assert not calls
    wanted = moe_reference.switch_glu(odd, x, indices, scores, made.gate, made.up, made.down)
    assert error(found, wanted) < 1e-5


def test_from_64_tokens_on_mlx_sorts() -> None:
    spec = replace(MIXED, down=MXFP4, expert_size=64, dtype=mx.float32)
    made, (x, indices, scores) = block(spec), routed(spec, 64)
    assert num_launches(64) is None
    with recorded() as calls:
        found = run(made, x, indices, scores)
    assert not calls
    wanted = moe_reference.switch_glu(spec, x, indices, scores, made.gate, made.up, made.down)
    assert error(found, wanted) < 1e-5
    with pytest.raises(ValueError, match="a shared expert needs scores"):
        run(block(spec, shared=replace(spec, num_experts=1, top_k=1)), x[:1], indices[:1], None)


SHAPES = {  # experts, hidden, width, top_k
    "even": (8, 512, 256, 4),
    "odd": (7, 640, 384, 3),  # neither a multiple of 512, experts odd, rows of 5 and 3 groups of 128
    "one": (1, 128, 128, 1),
    "all": (4, 256, 128, 4),  # every token uses every expert
    "many": (33, 128, 256, 8),
}


def cases(spec: BlockSpec) -> list[tuple[int, mx.array | None]]:
    """Numbers of tokens, and indices where they are not random ones."""
    return [
        (1, None),
        (2, None),
        (9, None),
        (63, None),
        (40, mx.full((40, spec.top_k), spec.num_experts - 1, dtype=mx.uint32)),  # one expert has all pairs
    ]


def check_all(made: Block, tokens: Sequence[tuple[int, mx.array | None]]) -> None:
    for number, indices in tokens:
        x, drawn, scores = routed(made.spec, number, seed=number)
        used = with_scores(made, number) if made.shared is not None else made
        check(used, x, drawn if indices is None else indices, scores)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("form", EVERY, ids=str)
def test_every_format(form: Format, dtype: mx.Dtype) -> None:
    """In gate and up together, and in up alone; down has another, so that each is met in each place."""
    down = EVERY[(EVERY.index(form) + 7) % len(EVERY)]
    experts, hidden, width, top_k = SHAPES["odd"]
    spec = BlockSpec(experts, hidden, width, top_k, form, form, down, SWIGLU, dtype)
    check_all(block(spec), [(1, None), (9, None), (40, None)])
    check_all(block(replace(spec, gate=None, activation=RELU2)), [(1, None), (9, None), (40, None)])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_in_every_order_of_threads(name: str, has_gate: bool) -> None:
    experts, hidden, width, top_k = SHAPES[name]
    gate, activation = (Format(4, 64), SWIGLU) if has_gate else (None, GELU)
    forms = gate, Format(6, 32), Format(4, 64)
    spec = BlockSpec(experts, hidden, width, top_k, *forms, activation, mx.float16)
    made = block(spec, has_bias=True)
    check_all(made, cases(spec))
    for tokens in (1, 9, 63):
        inputs = routed(spec, tokens)
        found = []
        for order in launch.ORDERS:
            for seed in (1, 2) if order == "random" else (1,):
                with launch.options(order=order, seed=seed):
                    found.append(run(made, *inputs))
        assert all(mx.array_equal(found[0], other) for other in found[1:])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_number_of_choices_with_an_expert_twice(top_k: int) -> None:
    spec = BlockSpec(6, 192, 160, top_k, Format(4, 32), Format(4, 32), Format(8, 32), GEGLU, mx.bfloat16)
    made = block(spec, has_bias=True)
    check_all(made, [(1, None), (3, None), (20, None)])
    x, indices, _ = routed(spec, 5)
    twice = mx.concatenate([indices[:, :1]] * top_k, axis=1)
    for given in (indices, twice):
        check(made, x, given, None)
        check(made, x[:1], given[:1], None)
        check(made, x, given, routed(spec, 5, seed=4)[2])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation_and_far_values(kind: str) -> None:
    """Values large enough that each clamp cuts and exp overflows."""
    activation = Activation(kind, alpha=1.3, limit=2.5)
    gate = Format(5, 64) if activation.has_gate else None
    spec = BlockSpec(5, 128, 96, 2, gate, Format(5, 64), Format(5, 32), activation, mx.float16)
    made = block(spec, has_bias=True)
    for tokens in (1, 6):
        x, indices, scores = routed(spec, tokens)
        check(made, x, indices, scores)
        check(made, x * (8 if "clamped" in kind or "oai" in kind else 3), indices, scores)
    bias = mx.concatenate([mx.full((5, 48), -300.0), mx.full((5, 48), 100.0)], axis=1).astype(mx.float16)
    if made.gate is None:  # relu2 of 300 is no float16
        far = replace(made, up=replace(made.up, bias=mx.maximum(bias, -60000) / 2))
    else:
        far = replace(made, gate=replace(made.gate, bias=bias))
    check(far, *routed(spec, 6))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("width", [64, 320, 1024])
def test_shared_experts_of_another_width_and_format(width: int) -> None:
    spec = BlockSpec(7, 192, 160, 3, Format(4, 64), Format(4, 64), Format(3, 32), SWIGLU, mx.bfloat16)
    for forms in ((Format(8, 64), Format(8, 64), Format(8, 64)), (PLAIN, MXFP4, Format(2, 64))):
        shared = BlockSpec(1, 192, width, 1, *forms, GEGLU, mx.bfloat16)
        for has_bias in (False, True):
            made = block(spec, has_bias=has_bias, shared=shared)
            check_all(made, [(1, None), (2, None), (33, None), (63, None)])
            check(made, *routed(spec, 1))
            check(made, *routed(spec, 33))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_float32_and_scales_in_another_dtype() -> None:
    for forms in ((Format(4, 64),) * 3, (PLAIN,) * 3, (MXFP4,) * 3):
        spec = BlockSpec(5, 192, 128, 3, *forms, SWIGLU, mx.float32)
        check_all(block(spec, has_bias=True), [(1, None), (6, None)])
    spec = BlockSpec(5, 192, 128, 3, *(Format(8, 64),) * 3, SWIGLU, mx.bfloat16)
    wide = block(replace(spec, dtype=mx.float32), has_bias=True)
    for tokens in (1, 6):
        x, indices, scores = routed(spec, tokens)
        check(replace(wide, spec=spec), x, indices, scores.astype(mx.float32))


def expert_bytes(made: Block, indices: mx.array) -> int:
    """Of the experts that are used, each counted once."""
    used = len(np.unique(np.array(indices)))
    parts = [part for part in (made.gate, made.up, made.down) if part is not None]
    arrays = [a for e in parts for a in (e.weight, e.scales, e.biases, e.bias)]
    return sum(a.nbytes for a in arrays if a is not None) // made.spec.num_experts * used


def requested(log: launch.Options) -> int:
    """Bytes of weights, scales and biases that the kernels asked for, summed over threads."""
    parts = ("_weight", "_scales", "_biases", "_bias")
    return sum(
        traffic.requested_bytes
        for entry in log.launches
        for name, traffic in entry.traffic.items()
        if name.endswith(parts)
    )


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", [Format(4, 64), Format(3, 32), Format(8, 128), *EVERY[-4:]], ids=str)
@pytest.mark.parametrize("has_gate", [True, False])
def test_an_expert_is_read_once_for_all_its_tokens(form: Format, has_gate: bool) -> None:
    """Watched, so that nothing lies outside its buffer and no threads race."""
    gate, activation = (form, SWIGLU) if has_gate else (None, RELU2)
    spec = BlockSpec(16, 256, 128, 4, gate, form, form, activation, mx.bfloat16)
    made = block(spec)
    for tokens in (1, 2, 8, 16, 32, 63):
        x, indices, scores = routed(spec, tokens, seed=tokens)
        with launch.options(mode="watched") as log:
            run(made, x, indices, scores)
        ratio = requested(log) / expert_bytes(made, indices)
        print(f"{form} {tokens} tokens: {ratio:.3f}")
        assert ratio <= 1.3, (form, tokens, ratio)
