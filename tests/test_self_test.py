"""The self-test of kernels: what it takes, what it refuses, and that it never harms."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from kernels import expert_blocks, expert_subject, measure, moe, self_test, switch
from kernels.expert_subject import ExpertSubject
from kernels.measure import Times
from kernels.verdicts import NOT_YET, Timed, Verdict
from tests.test_switch import taken_of

HIDDEN, EXPERT, NUM_EXPERTS, TOP_K = 64, 32, 6, 2
CLASSES = ((1, 1), (2, 4), (5, 8))
ALL = [True] * len(CLASSES)
SHORT_S = 0.05


@pytest.fixture(autouse=True)
def _right(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's operations in the place of the kernels: right by construction."""
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    monkeypatch.setattr(expert_subject, "CLASSES", CLASSES)


def taken_layers(count: int = 2, bits: int = 4) -> list[nn.Module]:
    """Quantised layers that were called once."""
    layers = []
    for _ in range(count):
        layer = SwitchGLU(HIDDEN, EXPERT, NUM_EXPERTS)
        nn.quantize(layer, 32, bits)
        layer.eval()
        layers.append(layer)
    switch.take_over(layers, switch.Never())
    for layer in layers:
        layer(mx.zeros((1, 1, HIDDEN), mx.float32), mx.zeros((1, 1, TOP_K), mx.uint32))
    return layers


def taken(verdicts: Sequence[Verdict]) -> list[bool]:
    return [one.is_taken for one in verdicts]


def only(report: self_test.Report) -> tuple[Verdict, ...]:
    (verdicts,) = report.blocks.values()
    return verdicts


def test_what_is_right_is_taken_where_nothing_is_timed() -> None:
    layers, steps = taken_layers(), []
    report = self_test.self_test(layers, None, on_step=lambda: steps.append(1))
    assert (report.backend, report.num_layers, report.num_tested) == ("emulated", 2, 1)
    assert list(report.blocks) == [
        "2 of 6 experts, 64 x 32, gate affine4/32 (float32), up affine4/32 (float32), down affine4/32 "
        "(float32), swiglu, float32"
    ]
    assert taken(only(report)) == ALL
    assert all(0 <= one.error < 1e-4 for one in only(report))
    assert len(steps) > len(ALL)
    x, indices = mx.zeros((1, 3, HIDDEN), mx.float32), mx.zeros((1, 3, TOP_K), mx.uint32)
    for layer in layers:
        layer(x, indices)
        known = taken_of(layer)
        assert known.num_plain == 1


def test_layers_without_a_gate_are_tested_too() -> None:
    layer = SwitchMLP(HIDDEN, EXPERT, NUM_EXPERTS, activation=nn.ReLU2(), bias=True)
    layer.fc1 = layer.fc1.to_quantized(16, 4, mode="nvfp4")
    layer.fc2 = layer.fc2.to_quantized(32, 8, mode="mxfp8")
    layer.eval()
    switch.take_over([layer], switch.Never())
    layer(mx.zeros((1, 1, HIDDEN), mx.float32), mx.zeros((1, 1, TOP_K), mx.uint32))
    report = self_test.self_test([layer], None)
    assert list(report.blocks) == [
        "2 of 6 experts, 64 x 32, up nvfp4/16 (uint8) with bias, down mxfp8/32 (uint8) with bias, "
        "relu2, float32"
    ]
    assert taken(only(report)) == ALL
    assert all(0 <= one.error < 1e-4 for one in only(report))
    known = taken_of(layer)
    subject = ExpertSubject(known.forms[0], [layer])
    one = subject.inputs(2, 1)
    mine, theirs = (path.runs[0](one.x, one) for path in subject.paths(2))
    assert mx.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    packed, scales, bias = HIDDEN * EXPERT * 3 // 2, HIDDEN * EXPERT * 3 // 32, 4 * (HIDDEN + EXPERT)
    assert subject.needed_bytes(one) == one.num_experts * (packed + scales + bias)


def wrong(*args: Any) -> mx.array:
    return moe.run_by_mlx(*args) * 1.25


def not_a_number(*args: Any) -> mx.array:
    return moe.run_by_mlx(*args) * mx.nan


def raises(*_: Any) -> mx.array:
    raise RuntimeError("[metal::Device] Unable to build metal library\n from source")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong, "wrong by 2.5e-01 of the largest value; 1e-04 is allowed"),
        (not_a_number, "wrong by inf of the largest value; 1e-04 is allowed"),
        (raises, "RuntimeError: [metal::Device] Unable to build metal library from source"),
    ],
)
def test_what_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: Callable[..., mx.array], reason: str
) -> None:
    monkeypatch.setattr(moe, "run", kernel)
    layers = taken_layers()
    report = self_test.self_test(layers, tmp_path)
    assert not report.is_used
    assert {one.reason[:14] for one in only(report)} == {reason[:14]}
    assert only(report)[0].reason == reason
    if kernel is raises:
        assert not list(tmp_path.iterdir())  # an exception may not come again
    else:
        kept = json.loads(next(tmp_path.iterdir()).read_text(), parse_constant=pytest.fail)
        (one,) = kept["blocks"].values()
        assert len(one["verdicts"]) == len(CLASSES)
    x, indices = mx.ones((1, 3, HIDDEN), mx.float32), mx.zeros((1, 3, TOP_K), mx.uint32)
    assert mx.array_equal(layers[0](x, indices), SwitchGLU.__call__(layers[0], x, indices))


def test_a_size_of_which_one_end_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(block: moe.Block, x: mx.array, *others: Any) -> mx.array:
        return (wrong if x.shape[0] == 4 else moe.run_by_mlx)(block, x, *others)

    monkeypatch.setattr(moe, "run", kernel)
    verdicts = only(self_test.self_test(taken_layers(), None))
    assert [v.last for v in verdicts if not v.is_taken] == [4]


def test_the_faster_one_is_kept_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = {1: 1.9, 2: 1.5, 4: 1.1, 5: 1.4, 8: 0.9, 9: 1.01}
    monkeypatch.setattr(expert_subject, "CLASSES", ((1, 1), (2, 4), (5, 8), (9, 9), (10, 63), (64, 0)))
    monkeypatch.setattr(measure, "error_of", lambda *_: (1e-5, 2))

    def times(_: Any, num_tokens: int, on_step: Any) -> Times:
        return Times(10.0, 10.0 * gains.get(num_tokens, 1.3), 8.0, 9.0, 0.8e6)

    monkeypatch.setattr(measure, "times_of", times)
    layers = taken_layers()
    known = taken_of(layers[0])
    subject = ExpertSubject(known.forms[0], layers)
    verdicts = [self_test.judge(subject, *ends, is_timed=True) for ends in subject.classes]
    assert taken(verdicts) == [True, True, False, False, True, False]
    assert [round(one.ratio, 2) for one in verdicts] == [1.9, 1.1, 0.9, 1.01, 1.3, 0.0]
    assert verdicts[-1].reason == self_test.NO_KERNEL
    assert verdicts[2].reason == "0.90 times as fast as MLX's operations"
    assert verdicts[0].gb_s == 100.0
    assert verdicts[2].timed == (Timed(5, 10.0, 14.0), Timed(8, 10.0, 9.0))


class SlowKernels:
    """MLX's operations that take long for the first call of each form and number of tokens, as a compiler."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # bits, tokens

    def __call__(self, block: moe.Block, x: mx.array, *others: Any) -> mx.array:
        if (call := (block.spec.gate.bits, x.shape[0])) not in self.calls:
            self.calls.append(call)
            time.sleep(2 * SHORT_S)
        return moe.run_by_mlx(block, x, *others)


def test_what_a_start_had_no_time_for_is_tested_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One compilation takes longer than the start may: the others wait, and lose nothing."""
    kernels = SlowKernels()
    monkeypatch.setattr(moe, "run", kernels)
    layers = [*taken_layers(1), *taken_layers(1, bits=8)]
    report = self_test.self_test(layers, tmp_path, budget_s=SHORT_S)
    first, second = report.blocks.values()
    assert taken(first) == [True, False, False]
    assert [one.reason for one in (*first[1:], *second)] == [NOT_YET] * 5
    assert all(one.is_untested and not one.is_final for one in (*first[1:], *second))
    assert (report.num_tested, report.is_used, len(report.untested)) == (1, True, 5)
    x, indices = mx.ones((1, 3, HIDDEN), mx.float32), mx.zeros((1, 3, TOP_K), mx.uint32)
    known = [taken_of(layer) for layer in layers]
    for layer in layers:
        layer(x, indices)
    assert [one.num_calls for one in known] == [0, 0]
    while report.untested:
        assert self_test.try_next(report).is_taken
    ends = [(1,), (2, 4), (5, 8)]  # of each form the fewest tokens first
    assert kernels.calls == [(bits, size) for sizes in ends for bits in (4, 8) for size in sizes]
    assert [taken(found) for found in report.blocks.values()] == [ALL, ALL]
    for layer in layers:
        layer(x, indices)
    assert [one.num_calls for one in known] == [1, 1]  # from then on, in the same layers
    again = self_test.self_test([*taken_layers(1), *taken_layers(1, bits=8)], tmp_path, budget_s=0.0)
    assert (again.num_tested, again.untested, again.blocks) == (0, [], report.blocks)


def test_another_start_goes_on(tmp_path: Path) -> None:
    assert len(self_test.self_test(taken_layers(), tmp_path, budget_s=0.0).untested) == len(ALL)
    report = self_test.self_test(taken_layers(), tmp_path)
    assert (report.num_tested, taken(only(report))) == (1, ALL)


def test_what_is_wanted_elsewhere_is_tested_another_time(tmp_path: Path) -> None:
    report = self_test.self_test(taken_layers(), tmp_path, budget_s=0.0)

    def leave() -> None:
        raise self_test.WantedElsewhereError

    with pytest.raises(self_test.WantedElsewhereError):
        self_test.try_next(report, leave)
    assert (len(report.untested), [one.reason for one in only(report)]) == (3, [NOT_YET] * 3)
    assert (self_test.try_next(report).first, len(report.untested)) == (1, 2)


def test_what_another_node_of_the_machine_tested_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report, other = (self_test.self_test(taken_layers(), tmp_path, budget_s=0.0) for _ in range(2))
    assert self_test.try_next(other).is_taken
    monkeypatch.setattr(measure, "error_of", raises)
    assert self_test.try_next(report) == only(other)[0]
    assert (report.num_tested, other.num_tested) == (0, 1)
    assert not self_test.try_next(report).is_taken  # this one is its own, and fails
    again = self_test.self_test(taken_layers(), tmp_path, budget_s=0.0)
    assert taken(only(again)) == [True, False, False]  # neither wrote over the other


def test_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = self_test.self_test(taken_layers(), tmp_path)
    monkeypatch.setattr(measure, "error_of", raises)
    again = self_test.self_test(taken_layers(), tmp_path)
    assert (first.num_tested, again.num_tested) == (1, 0)
    assert again.blocks == first.blocks
    other = self_test.self_test(taken_layers(bits=8), tmp_path)
    assert (other.num_tested, other.is_used) == (1, False)


def test_layers_that_no_kernel_knows_say_why() -> None:
    class Odd(nn.Module):
        def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
            return x * gate

    layer = SwitchGLU(HIDDEN, EXPERT, NUM_EXPERTS, activation=Odd())
    layer.eval()
    switch.take_over([layer], switch.Never())
    layer(mx.zeros((1, 1, HIDDEN)), mx.zeros((1, 1, TOP_K), mx.uint32))
    report = self_test.self_test([layer], None)
    assert (report.blocks, report.reasons) == ({}, ["the activation Odd has no kernel"])


def test_without_a_backend_there_is_nothing_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = taken_layers()
    monkeypatch.setenv("MACRAME_KERNELS", "off")
    report = self_test.self_test(layers, None)
    assert (report.backend, report.blocks, report.is_used) == ("", {}, False)


def test_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, steps = taken_layers(), []
    monkeypatch.setattr(measure, "MAX_CALLS", 4)
    known = taken_of(layers[0])
    times = measure.times_of(ExpertSubject(known.forms[0], layers), 3, lambda: steps.append(1))
    assert times.ours_us > 0
    assert times.mlx_us > times.mlx_eval_us > 0
    assert len(steps) == 2 * (measure.NUM_ROUNDS + 1)
    each = expert_blocks.expert_nbytes(known.forms[0], layers[0])
    assert each == 3 * HIDDEN * EXPERT // 2 + 3 * HIDDEN * EXPERT // 32 * 8
    assert 2 * each <= times.needed_bytes <= 6 * each


def test_random_tokens() -> None:
    layers = taken_layers(1)
    known = taken_of(layers[0])
    made = expert_blocks.tokens(known.forms[0], 40, 3)
    assert (made.x.shape, made.indices.dtype, made.scores.dtype) == ((40, HIDDEN), mx.uint32, mx.float32)
    assert all(len(set(row)) == TOP_K for row in np.array(made.indices).tolist())
    assert set(np.array(made.indices).ravel().tolist()) == set(range(NUM_EXPERTS))
    few = expert_blocks.tokens(known.forms[0], 40, 3, num_experts=3)
    assert few.num_experts == 3
    assert {0, NUM_EXPERTS - 1} < set(np.array(few.indices).ravel().tolist())
