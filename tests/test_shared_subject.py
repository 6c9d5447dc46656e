"""The self-test of expert layers with the shared expert beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

from kernels import expert_subject, moe, self_test, switch
from kernels.expert_subject import ExpertSubject
from kernels.shared_subject import shared_subjects
from tests.test_shared_switch import Moe, taken_of
from tests.test_switch import EXPERT, HIDDEN, NUM_EXPERTS, TOP_K

CLASSES = ((1, 1), (2, 4))
ALL = [True, True]
NAME = (
    f"{TOP_K} of {NUM_EXPERTS} experts, {HIDDEN} x {EXPERT}, gate float32, up float32, down float32, swiglu, "
    "float32"
)
SHARED = f"{NAME}; a shared expert of 96, gate float32, up float32, down float32, swiglu"


@pytest.fixture(autouse=True)
def _right(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's operations in the place of the kernels: right by construction."""
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    monkeypatch.setattr(expert_subject, "CLASSES", CLASSES)
    mx.random.seed(11)


def called(count: int = 2) -> list[Moe]:
    models = [Moe(is_scaled=number % 2 == 1) for number in range(count)]
    for model in models:
        switch.take_over([model], switch.Never())
        model(mx.zeros((1, 1, HIDDEN)))
    return models


def report_of(models: list[Moe], folder: Path | None = None) -> self_test.Report:
    return self_test.self_test([model.switch_mlp for model in models], folder)


def taken(report: self_test.Report, name: str) -> list[bool]:
    return [verdict.is_taken for verdict in report.blocks[name]]


def joins(model: Moe, num_tokens: int = 3) -> int:
    """How often the shared expert joins in two calls."""
    before = taken_of(model)[0].num_joined
    x = mx.random.normal((1, num_tokens, HIDDEN))
    assert mx.allclose(model(x), model(x), rtol=1e-5, atol=1e-6)
    return taken_of(model)[0].num_joined - before


def test_what_is_right_is_taken_where_nothing_is_timed(tmp_path: Path) -> None:
    models = called()
    report = report_of(models, tmp_path)
    assert list(report.blocks) == [NAME, SHARED]
    assert (taken(report, NAME), taken(report, SHARED)) == (ALL, ALL)
    assert report.num_tested == 2
    assert [joins(model) for model in models] == [1, 1]
    assert report.num_calls == 4  # a layer is counted once
    assert report_of(called(), tmp_path).num_tested == 0, "verdicts are kept"


def wrong_with_a_shared_one(*args: Any) -> mx.array:
    return moe.run_by_mlx(*args) * (1.25 if len(args) > 4 and args[4] is not None else 1)


def wrong_with_a_factor(*args: Any) -> mx.array:
    has_factor = len(args) > 4 and args[4] is not None and args[4].scores is not None
    return moe.run_by_mlx(*args) * (1.25 if has_factor else 1)


@pytest.mark.parametrize("wrong", [wrong_with_a_shared_one, wrong_with_a_factor])
def test_what_is_wrong_is_not_used_and_the_experts_alone_are(
    monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(moe, "run", wrong)
    models = called()
    report = report_of(models)
    assert (taken(report, NAME), taken(report, SHARED)) == (ALL, [False, False])
    assert report.blocks[SHARED][0].reason.startswith("wrong by ")
    assert [joins(model) for model in models] == [0, 0]
    assert taken_of(models[0])[0].num_fused == 1


def test_it_is_compared_with_what_the_experts_alone_are_best_with(monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = called(1)
    asked: list[bool] = []

    def run(*args: Any) -> mx.array:
        asked.append(args[4] is not None)
        return moe.run_by_mlx(*args)

    monkeypatch.setattr(moe, "run", run)
    layer = model.switch_mlp
    (subject,) = shared_subjects([ExpertSubject(taken_of(model)[0].forms[0], [layer])])
    one = subject.inputs(3, 1)
    answers = []
    for chooser, wanted in ((switch.Never(), [True]), (switch.Always(), [True, False])):
        taken_of(model)[0].choose(chooser)
        asked.clear()
        answers += [path.runs[0](one.x, one) for path in subject.paths(3)]
        assert asked == wanted
    assert all(mx.allclose(answers[0], other, rtol=1e-4, atol=1e-5) for other in answers[1:])
    experts = subject.experts.needed_bytes(one)
    assert subject.needed_bytes(one) == experts + 3 * 4 * 96 * HIDDEN


def test_one_that_cannot_join_is_no_subject() -> None:
    models = [Moe(), Moe()]
    own = models[0].shared_experts
    own.gate_proj.weight = own.up_proj.weight = mx.zeros((98, HIDDEN))  # 98 are not whole words of a lane
    own.down_proj.weight = mx.zeros((HIDDEN, 98))
    for model in models:
        switch.take_over([model], switch.Never())
        model(mx.zeros((1, 1, HIDDEN)))
    report = report_of(models)
    assert list(report.blocks) == [NAME, SHARED]
    assert [joins(model) for model in models] == [0, 1]


class Apart(Moe):
    """Whose shared expert is added times a number."""

    def __call__(self, x: mx.array, _: mx.array | None = None) -> mx.array:
        return super().__call__(x, mx.zeros_like(x)) + 0.5 * self.shared_experts(x)


def test_one_that_its_model_does_not_add_to_the_sum_is_no_subject() -> None:
    """A test would take the start's time, and tell of kernels that nothing ever calls."""
    models = [Apart(), Moe()]
    for model in models:
        switch.take_over([model], switch.Never())
        model(mx.zeros((1, 1, HIDDEN)))
    shared = [taken_of(model)[1] for model in models]
    assert [one.is_added for one in shared] == [False, True]
    (subject,) = shared_subjects([ExpertSubject(taken_of(models[0])[0].forms[0], _layers(models))])
    assert subject.experts.layers == _layers(models[1:])
    assert list(report_of(models[:1]).blocks) == [NAME]
    assert joins(models[0]) == 0


def _layers(models: list[Moe]) -> list[nn.Module]:
    return [model.switch_mlp for model in models]


def test_learning_computes_with_mlx_and_keeps_nothing() -> None:
    model, x = Moe(), mx.random.normal((1, 3, HIDDEN))
    wanted = model(x)
    switch.take_over([model], switch.Never())
    for _ in range(3):
        assert mx.array_equal(model(x), wanted)
    taken = taken_of(model)[0]
    assert (taken.num_calls, taken.num_joined) == (0, 0)


def test_another_form_than_the_tested_one_is_not_computed_so() -> None:
    model = called(1)[0]
    report_of([model])
    assert joins(model) == 1
    nn.quantize(model.shared_experts, 32, 4)
    assert joins(model, 2) == 0
