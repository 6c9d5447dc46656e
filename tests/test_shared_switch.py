"""A shared expert that is taken over with its experts: when it joins their sum, and when nothing changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models.switch_layers import SwitchGLU

from kernels import moe, switch
from kernels.moe_spec import BlockSpec
from kernels.shared_switch import TakenShared
from tests import test_switch
from tests.test_shared_expert import Mlp
from tests.test_switch import EXPERT, HIDDEN, NUM_EXPERTS, TOP_K


@pytest.fixture(autouse=True)
def _has_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    mx.random.seed(11)


class Moe(nn.Module):
    """As mlx-lm's models write it, with a factor of each token (qwen2_moe) or without (deepseek_v3)."""

    def __init__(self, *, is_scaled: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.switch_mlp = SwitchGLU(HIDDEN, EXPERT, NUM_EXPERTS, bias=bias)
        self.shared_experts = Mlp(bias=bias)
        self.shared_gate = nn.Linear(HIDDEN, 1) if is_scaled else None
        self.eval()

    def __call__(self, x: mx.array, beside: mx.array | None = None) -> mx.array:
        scores = mx.softmax(self.gate(x))
        indices = mx.argpartition(-scores, TOP_K - 1)[..., :TOP_K]
        weights = mx.take_along_axis(scores, indices, -1)
        y = self.switch_mlp(x, indices)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        own = self.shared_experts(x if beside is None else beside)
        if self.shared_gate is not None:
            own = mx.sigmoid(self.shared_gate(x)) * own
        return y + own


def taken_of(model: Moe) -> tuple[switch.Taken, TakenShared]:
    taken = test_switch.taken_of(model.switch_mlp)
    assert taken.shared is not None
    return taken, taken.shared


def tokens(num_tokens: int = 3) -> mx.array:
    return mx.random.normal((1, num_tokens, HIDDEN))


@pytest.mark.parametrize("is_scaled", [False, True])
def test_it_is_seen_once_for_each_shape_and_then_joins(is_scaled: bool) -> None:
    model, x = Moe(is_scaled=is_scaled), tokens()
    wanted = model(x)
    switch.take_over([model], switch.Always())
    taken, shared = taken_of(model)
    counts = []
    for _ in range(3):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
        counts.append((taken.num_plain, taken.num_fused, taken.num_joined))
    assert counts == [(1, 0, 0), (1, 1, 1), (1, 2, 2)]
    assert [plan.is_scaled for plan in shared.plans.values()] == [is_scaled]
    model(x[:, :1])
    model(x[:, :1])
    assert taken.num_joined == 3


def test_its_own_code_is_called_where_it_is_given_another_x() -> None:
    model, x, beside = Moe(), tokens(), tokens()
    wanted = model(x, beside)
    switch.take_over([model], switch.Always())
    for _ in range(2):
        assert mx.allclose(model(x, beside), wanted, rtol=1e-5, atol=1e-6)
    assert taken_of(model)[0].num_joined == 0
    model(x)  # the shape has been seen to stay apart
    assert taken_of(model)[0].num_joined == 0


def test_another_x_at_a_shape_that_joined_is_computed_apart() -> None:
    model, x, beside = Moe(), tokens(), tokens()
    wanted = model(x, beside)
    switch.take_over([model], switch.Always())
    model(x)
    assert mx.allclose(model(x, beside), wanted, rtol=1e-5, atol=1e-6)
    assert (taken_of(model)[0].num_fused, taken_of(model)[0].num_joined) == (1, 0)


def test_release_and_training_give_back_what_was_there() -> None:
    model, x = Moe(), tokens()
    wanted, kinds = model(x), (type(model.switch_mlp), type(model.shared_experts))
    layers = switch.take_over([model], switch.Always())
    model(x)
    model.train()
    assert mx.array_equal(model(x), wanted)
    model.eval()
    switch.release(layers)
    assert (type(model.switch_mlp), type(model.shared_experts)) == kinds
    assert mx.array_equal(model(x), wanted)
    assert switch.take_over([model], switch.Always()) == layers


def test_an_adapter_is_computed_and_seen_to_go() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    model, x = Moe(), tokens()
    switch.take_over([model], switch.Always())
    for _ in range(2):
        model(x)
    base = model.shared_experts.up_proj
    adapted = LoRALinear.from_base(base)
    adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
    model.shared_experts.up_proj = adapted
    switch.release([model.switch_mlp])
    wanted = model(x)
    switch.take_over([model], switch.Always())
    assert test_switch.taken_of(model.switch_mlp).shared is None
    model.shared_experts.up_proj = base
    switch.release([model.switch_mlp])
    switch.take_over([model], switch.Always())
    for _ in range(2):
        model(x)
    taken, _ = taken_of(model)
    assert taken.num_joined == 1
    model.shared_experts.up_proj = adapted  # after it was taken over
    for _ in range(2):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert taken.num_joined == 1
    model.shared_experts.up_proj = base
    model(x)
    assert taken.num_joined == 2


def test_new_weights_are_used() -> None:
    model, x = Moe(), tokens()
    switch.take_over([model], switch.Always())
    for _ in range(2):
        model(x)
    model.shared_experts.up_proj.weight = mx.random.normal((96, HIDDEN))
    found = model(x)
    assert taken_of(model)[0].num_joined == 2
    switch.release([model.switch_mlp])
    assert mx.allclose(found, model(x), rtol=1e-5, atol=1e-6)


def test_another_form_of_the_same_class_is_computed_apart_and_decided_anew() -> None:
    model, x = Moe(), tokens()
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: path.endswith("_proj"))
    switch.take_over([model], switch.Always())
    for _ in range(2):
        model(x)
    taken, shared = taken_of(model)
    fine = nn.QuantizedLinear.from_linear(Mlp().down_proj, 32, 8)
    untouched = copy.deepcopy(model)
    untouched.shared_experts.down_proj = model.shared_experts.down_proj = fine
    wanted = untouched(x)
    counts = []
    for _ in range(3):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
        counts.append((taken.num_fused, taken.num_joined))
    assert counts == [(2, 1), (2, 1), (3, 2)]  # apart, watched, joined
    assert not taken.failure
    spec = shared.spec(mx.float32)
    assert isinstance(spec, BlockSpec)
    assert spec.down.bits == 8


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_mlx_lms_own_and_the_original_goes_on(duplicate: Any) -> None:
    model, x = Moe(), tokens()
    kinds = type(model.switch_mlp), type(model.shared_experts)
    switch.take_over([model], switch.Always())
    for _ in range(2):
        wanted = model(x)
    other = duplicate(model)
    assert (type(other.switch_mlp), type(other.shared_experts)) == kinds
    assert mx.allclose(other(x), wanted, rtol=1e-5, atol=1e-6)
    own = other.shared_experts
    own.down_proj.weight = own.down_proj.weight * 5
    assert not mx.allclose(other(x), wanted, rtol=1e-2, atol=1e-3)
    assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert taken_of(model)[0].num_joined == 2


class Masked(Mlp):
    def __call__(self, hidden: mx.array, mask: mx.array | None = None) -> mx.array:
        answer = super().__call__(hidden)
        return answer if mask is None else answer * mask


@pytest.mark.parametrize(
    "call",
    [
        lambda own, x: own(hidden=x),
        lambda own, x: own(x, mask=mx.array(0.5)),
        lambda own, x: own(x, mx.array(0.5)),
    ],
)
def test_a_call_with_more_or_by_name_is_mlx_lms_own(call: Any) -> None:
    model, x = Moe(), tokens()
    model.shared_experts = Masked()
    model.eval()
    wanted = call(model.shared_experts, x)
    switch.take_over([model], switch.Always())
    for _ in range(2):
        model(x)  # it joins where it is called as ever
    assert taken_of(model)[0].num_joined == 1
    assert mx.array_equal(call(model.shared_experts, x), wanted)


def test_a_kernel_that_was_not_chosen_alone_computes_nothing_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be wrong there: not where a shape is watched, and not where the answer joins no sum later."""
    model, x = Moe(), tokens()
    beside = tokens()
    wanted = model(x), model(x, beside)

    def run(*args: Any) -> mx.array:
        assert len(args) == 5
        assert args[4] is not None, "the experts alone"
        return moe.run_by_mlx(*args)

    monkeypatch.setattr(moe, "run", run)
    switch.take_over([model], switch.Never())
    taken, shared = taken_of(model)
    shared.choose(switch.Always())
    for _ in range(3):
        assert mx.allclose(model(x), wanted[0], rtol=1e-5, atol=1e-6)
        assert mx.allclose(model(x, beside), wanted[1], rtol=1e-5, atol=1e-6)
    assert not taken.failure
    assert (taken.num_plain, taken.num_fused, taken.num_joined) == (0, 2, 2)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_kernel_that_raises_is_given_up_for_both(monkeypatch: pytest.MonkeyPatch, is_scaled: bool) -> None:
    model, x = Moe(is_scaled=is_scaled), tokens()
    wanted = model(x)
    switch.take_over([model], switch.Always())
    model(x)

    def fails(*_: Any) -> mx.array:
        raise RuntimeError("no such function")

    monkeypatch.setattr(moe, "run", fails)
    assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    taken, shared = taken_of(model)
    assert taken.failure == "RuntimeError: no such function"
    assert (taken.plans, shared.plans) == ({}, {})
    assert mx.array_equal(model(x), wanted)


class Only:
    """Takes some numbers of tokens."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def takes(self, spec: BlockSpec, num_tokens: int) -> bool:
        return num_tokens in self.sizes


@pytest.mark.parametrize(
    ("alone", "joined", "counts"),
    [
        (Only(), Only(), (0, 0, 0)),
        (Only(3), Only(), (1, 1, 0)),
        (Only(), Only(3), (0, 1, 1)),  # no kernel computes what none was chosen for
        (Only(3), Only(3), (1, 1, 1)),
        (Only(), Only(2), (0, 0, 0)),
    ],
)
def test_each_has_its_own_chooser(alone: Only, joined: Only, counts: tuple[int, int, int]) -> None:
    model, x = Moe(), tokens()
    wanted = model(x)
    switch.take_over([model], switch.Always())
    model(x)
    model(x)  # what was decided is forgotten with a new chooser
    taken, shared = taken_of(model)
    before = taken.num_plain, taken.num_fused, taken.num_joined
    taken.choose(alone)
    shared.choose(joined)
    for _ in range(2):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    after = taken.num_plain, taken.num_fused, taken.num_joined
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == counts


def test_many_shapes_are_forgotten_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "MAX_SHAPES", 2)
    model = Moe()
    switch.take_over([model], switch.Always())
    taken, shared = taken_of(model)
    for num_tokens in (1, 2, 3, 4, 3, 3, 4, 4):
        x = tokens(num_tokens)
        found = model(x)
        assert len(taken.plans) <= 2
        assert len(shared.plans) <= 2
        assert found.shape == x.shape
    assert taken.num_joined == 4


def test_a_module_that_does_something_else_is_left_alone() -> None:
    model, x = Moe(), tokens()
    model.shared_experts.__class__ = type("Own", (Mlp,), {"__call__": lambda self, x: x * 2})
    wanted = model(x)
    switch.take_over([model], switch.Always())
    taken = test_switch.taken_of(model.switch_mlp)
    assert taken.shared is None
    for _ in range(2):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert taken.num_fused == 1
