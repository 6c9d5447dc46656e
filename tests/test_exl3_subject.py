"""EXL3 matrices in the self-test: what is tried, what is taken, and that it never harms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import exl3_reference as reference
from kernels import exl3_subject, measure, self_test
from kernels.exl3 import Exl3Linear, Exl3SwitchLinear
from kernels.exl3_choice import OPERATIONS, Called, Choice, Way, learning
from kernels.exl3_reference import BLOCK
from kernels.exl3_subject import Exl3Subject, exl3_subjects
from kernels.exl3_trials import Exl3Layer, draw, product, reference_of
from kernels.measure import Times
from kernels.random_matrix import random_matrix
from kernels.self_test import ENDLESS, Report, judge
from kernels.verdicts import Verdict
from tests.emulated import needs_compiler
from tests.mlx_kernels import exl3_by_mlx

FLOAT32 = Called(mx.float32)
EXPERTS = Called(mx.float32, 3)
ALL = Choice(((1, 1, "in place"), (2, 8, "in place"), (9, 32, "in place"), (33, 0, "unpacked")))


def linear(sizes: tuple[int, int] = (200, 130), bits: int = 3, **others: Any) -> Exl3Layer:
    return random_matrix(sizes, [(bits, "mcg")], FLOAT32, **others)


def experts(kinds: Sequence[Any] = ((3, "mcg"),) * 8, called: Called = EXPERTS) -> Exl3Layer:
    return random_matrix((200, 130), kinds, called, has_experts=True, has_bias=True)


def only(report: Report) -> tuple[Verdict, ...]:
    (verdicts,) = report.blocks.values()
    return verdicts


@pytest.fixture
def _by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's operations in the place of the kernels: right by construction."""
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    exl3_by_mlx(monkeypatch)


def test_forms_have_a_line_each_and_layers_that_share_them_are_tried_once() -> None:
    never_called = Exl3Linear(128, 128, 3, "mcg")
    first, same, other = linear(), linear(seed=1), linear(bits=2, has_bias=True)
    own = experts(called=Called(mx.float32, 3, has_own_rows=True))
    found = exl3_subjects([never_called, first, experts(), same, own, other])
    assert {one.name: len(one.layers) for one in found} == {
        "exl3 3 of 8 experts, 200 -> 130, 3 bits mcg, with bias, float32": 1,
        "exl3 3 of 8 experts, 200 -> 130, 3 bits mcg, with bias, a row for each, float32": 1,
        "exl3 200 -> 130, 3 bits mcg, float32": 2,
        "exl3 200 -> 130, 2 bits mcg, with bias, float32": 1,
    }
    assert [len(one.layers) for one in found] == [1, 1, 2, 1]  # what holds most first


def test_classes_end_where_another_kernel_begins() -> None:
    mixed = [(3, "mcg"), (2, "mul1")] * 4
    for layer, called, classes, ways in (
        (linear(), FLOAT32, ((1, 1), (2, 8), (9, 32), (33, 0)), ["in place"] * 3 + ["unpacked"]),
        (experts(), EXPERTS, ((1, 1), (2, 8), (9, 170), (171, 0)), ["in place"] * 3 + ["unpacked"]),
        (experts(mixed), EXPERTS, ((1, 1), (2, 8), (9, 170), (171, 0)), ["unpacked"] * 4),
        (experts(), Called(mx.float32, 100), ((1, 1), (2, 5), (6, 0)), ["in place"] * 2 + ["unpacked"]),
    ):
        one = Exl3Subject("", [layer], called)
        assert tuple(one.classes) == classes
        assert [one.way(first) for first, _ in classes] == ways


@pytest.mark.parametrize(
    ("called", "num_tokens", "shape"),
    [
        (Called(mx.float32, 3), 5, (5, 1, 1, 200)),
        (Called(mx.float32, 3, has_own_rows=True), 5, (5, 3, 1, 200)),
        (Called(mx.float32, 3), 30, (90, 1, 200)),  # sorted by expert, as mlx-lm does
    ],
)
def test_experts_are_called_as_models_do_and_beside_the_reference(
    called: Called, num_tokens: int, shape: tuple[int, ...]
) -> None:
    kinds: list[Any] = [(3, "mcg"), (2, "mul1"), (3, "mcg"), (5, "3inst")]
    layer = experts(kinds, called)
    assert isinstance(layer, Exl3SwitchLinear)
    known = reference_of(layer, called)
    one = draw(layer, called, known.x, num_tokens, seed=1, known=known.experts)
    assert one.x.shape == shape
    assert one.is_sorted == (len(shape) == 3)
    assert set(one.experts.tolist()) <= {0, 1, 2, 3}
    answer = product(layer, one.x, one, "operations").reshape(num_tokens * 3, 130)
    assert mx.allclose(answer[:, known.columns], known.of(one), rtol=1e-5, atol=1e-5)
    assert known.columns.size == 130
    for at, (row, number) in enumerate(zip(one.rows[:4], one.experts[:4], strict=True)):
        own = layer.expert(int(number))
        weight = reference.dense(*map(np.array, (own.trellis, own.suh, own.svh)), own.codebook)
        wanted = np.array(known.x[int(row)]) @ weight[:130, :200].T + np.array(layer.bias[int(number)])
        assert np.abs(np.array(answer[at]) - wanted).max() < 1e-4


def test_the_reference_takes_blocks_over_the_whole_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.exl3_trials.REFERENCE_WEIGHTS", 128 * 128 * 3)
    layer = linear((128, 10 * BLOCK + 5))
    known = reference_of(layer, FLOAT32)
    columns = np.array(known.columns)
    assert np.unique(columns // BLOCK).tolist() == [0, 5, 10]
    assert columns[-1] == 10 * BLOCK + 4
    answer = product(
        layer, known.x, draw(layer, FLOAT32, known.x, 1, seed=0, known=known.experts), "operations"
    )
    assert mx.allclose(answer[:, known.columns], known.wanted[0], rtol=1e-5, atol=1e-5)


def test_learning_takes_a_pass_without_a_product() -> None:
    layers = [Exl3Linear(200, 130, 3, "mcg"), Exl3SwitchLinear(200, 130, [(3, "mcg")] * 4)]
    with learning(layers):
        y = layers[0](mx.ones((1, 2, 200), mx.float16))
        z = layers[1](mx.ones((1, 2, 1, 1, 200), mx.float16), mx.zeros((1, 2, 3), mx.uint32))
    assert (y.shape, z.shape) == ((1, 2, 130), (1, 2, 3, 1, 130))
    assert not mx.any(y)
    assert not mx.any(z)
    assert [one.called for one in layers] == [Called(mx.float16), Called(mx.float16, 3)]
    assert [(one.choice, one.num_calls) for one in layers] == [(OPERATIONS, 0)] * 2


@pytest.mark.usefixtures("_by_operations")
def test_what_is_right_is_taken_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers, steps = [linear(), linear(seed=1)], []
    report = self_test.self_test([], tmp_path, matrices=layers, on_step=lambda: steps.append(1))
    assert (report.backend, report.num_layers, report.num_matrices) == ("emulated", 0, 2)
    assert (report.num_tested, report.is_used, len(steps)) == (1, True, 6)
    assert [one.choice for one in layers] == [ALL, ALL]
    assert all(one.error < 1e-5 for one in only(report))
    for layer in layers:
        layer(mx.zeros((1, 3, 200)))
    assert report.num_calls == 2
    monkeypatch.setattr(measure, "error_of", None)
    again = self_test.self_test([], tmp_path, matrices=[linear()])
    assert (again.num_tested, again.blocks) == (0, report.blocks)


@pytest.mark.usefixtures("_by_operations")
@pytest.mark.parametrize(("wrong_way", "spans"), [("in place", ALL.spans[3:]), ("unpacked", ALL.spans[:3])])
def test_what_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, wrong_way: Way, spans: tuple[Any, ...]
) -> None:
    right = Exl3Linear.product

    def wrong(self: Exl3Linear, x: mx.array, way: Way) -> mx.array:
        y = right(self, x, way)
        return y.at[..., 129].add(3 * mx.abs(y).max()) if way == wrong_way else y

    monkeypatch.setattr(Exl3Linear, "product", wrong)
    layer = linear()
    verdicts = only(self_test.self_test([], None, matrices=[layer]))
    assert layer.choice == Choice(spans)
    for one in verdicts:
        is_right = (one.first < 33) == (wrong_way == "unpacked")
        assert one.is_taken == is_right
        assert one.reason == "" if is_right else one.reason.startswith("wrong by ")


@pytest.mark.usefixtures("_by_operations")
def test_a_kernel_that_fails_is_not_used_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = Exl3Linear.product

    def fail(self: Exl3Linear, x: mx.array, way: Way) -> mx.array:
        if way == "in place":
            raise RuntimeError("no such kernel")
        return right(self, x, way)

    monkeypatch.setattr(Exl3Linear, "product", fail)
    layer = linear()
    report = self_test.self_test([], tmp_path, matrices=[layer])
    assert [one.reason for one in only(report)] == ["RuntimeError: no such kernel"] * 3 + [""]
    assert layer.choice == Choice(ALL.spans[3:])
    monkeypatch.setattr(Exl3Linear, "product", right)
    again = linear()
    assert self_test.self_test([], tmp_path, matrices=[again]).num_tested == 1
    assert again.choice == ALL


@pytest.mark.usefixtures("_by_operations")
def test_a_kernel_that_fails_in_use_gives_the_answer_of_the_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers, x = [linear(), experts()], mx.ones((2, 200))
    report = self_test.self_test([], None, matrices=layers)
    calls = [(x,), (x[:, None, None], mx.zeros((2, 3), mx.uint32))]
    for layer, call in zip(layers, calls, strict=True):
        right, at = type(layer).product, len(call)

        def fail(self: Any, *args: Any, right: Any = right, at: int = at) -> mx.array:
            if args[at] != "operations":
                raise RuntimeError("the device is lost")
            return right(self, *args)

        wanted = layer(*call)
        monkeypatch.setattr(type(layer), "product", fail)
        assert mx.array_equal(layer(*call), wanted)
        assert layer.choice == OPERATIONS
    assert report.failures == ["RuntimeError: the device is lost"]
    assert report.num_calls == 2
    assert "an EXL3 layer goes back to MLX's operations: RuntimeError: the device is lost" in caplog.text


@pytest.mark.usefixtures("_by_operations")
@pytest.mark.parametrize("make", [linear, pytest.param(experts, marks=pytest.mark.long)])
def test_times_are_taken_in_turn_at_both_ends(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(measure, "MAX_CALLS", 4)
    monkeypatch.setattr(measure, "NUM_ROUNDS", 1)
    layer = make()
    assert layer.called is not None
    (subject,) = exl3_subjects([layer])
    steps: list[int] = []
    times = measure.times_of(subject, 2, lambda: steps.append(1))
    assert len(steps) == 4
    assert times.ours_us > 0
    assert times.mlx_us > times.mlx_eval_us > 0
    whole = exl3_subject.stored_bytes(layer)
    assert whole // 8 * 3 <= times.needed_bytes <= whole
    sizes: list[int] = []

    def told(_: Any, num_tokens: int, __: Any) -> Times:
        sizes.append(num_tokens)
        return Times(10.0, 30.0 if num_tokens != 32 else 9.0, 8.0, 9.0, 0.8e6)

    monkeypatch.setattr(measure, "times_of", told)
    verdicts = [judge(subject, *ends, is_timed=True) for ends in subject.classes]
    assert sizes == sorted({end for ends in subject.classes for end in (ends[0], ends[1] or ENDLESS)})
    slow = [one.last for one in verdicts if not one.is_taken]
    assert slow == ([32] if make is linear else [])


def test_a_few_matrices_are_timed_with_pieces_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = linear((128, 128)), linear((512, 256), bits=4)
    assert isinstance(small, Exl3Linear)
    assert isinstance(large, Exl3Linear)
    one = exl3_subjects([small, large])[-1]
    runs, path = one.paths(1)[0].runs, one.paths(1)[1]
    assert len(runs) == 1 + large.trellis.size // small.trellis.size == 11
    drawn = one.inputs(1, 0)
    assert not mx.array_equal(path.runs[0](drawn.x, drawn), path.runs[1](drawn.x, drawn))
    monkeypatch.setattr(exl3_subject, "CACHE_BYTES", 3 * small.trellis.nbytes)
    again = exl3_subjects([small, large])[-1]
    assert len(again.paths(1)[0].runs) == 3


def test_without_a_backend_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", "off")
    layer = linear()
    report = self_test.self_test([], None, matrices=[layer])
    assert (report.backend, report.blocks, report.num_matrices) == ("", {}, 1)
    assert layer.choice == OPERATIONS


@pytest.mark.long
@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kinds", [[(3, "mcg")] * 8, [(3, "mcg"), (2, "mul1")] * 4])
def test_emulated_kernels_are_right_for_all_numbers_of_rows(kinds: list[Any]) -> None:
    own = Called(mx.float32, 3, has_own_rows=True)
    layers = [linear(), linear(has_bias=True), experts(kinds), experts(kinds, own)]
    report = self_test.self_test([], None, matrices=layers)
    assert len(report.blocks) == 4
    for verdicts in report.blocks.values():
        assert [(one.is_taken, one.reason) for one in verdicts] == [(True, "")] * 4
        assert all(one.error < 1e-5 and one.num_launches for one in verdicts)
    assert layers[0].choice == ALL
    ways = [way for _, _, way in layers[2].choice.spans]
    assert ways == (["in place"] * 3 + ["unpacked"] if len({*kinds}) == 1 else ["unpacked"] * 4)
