"""A shared expert's answer beside a weighted sum: seen to be added, and then deferred until it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from kernels.expert_outputs import Use, outputs, watched
from kernels.shared_outputs import Added, shared_outputs, watched_shared

T, K, HIDDEN = 3, 2, 8
# y (1, T, k, hidden), scores (1, T, k), the shared expert's answer (1, T, hidden), a factor (1, T, 1)
Code = Callable[[Any, mx.array, Any, mx.array], Any]


def total(y: Any, scores: mx.array) -> Any:
    return (y * scores[..., None]).sum(axis=-2)


JOINED: dict[str, tuple[Code, Use, bool]] = {
    "deepseek": (lambda y, s, own, _: total(y, s) + own, Use(False, False, True), False),
    "deepseek_v3": (lambda y, s, own, _: total(y, s).astype(y.dtype) + own, Use(False, True, True), False),
    "qwen2_moe": (lambda y, s, own, f: total(y, s) + f * own, Use(False, False, True), True),
    "factor behind": (lambda y, s, own, f: total(y, s) + own * f, Use(False, False, True), True),
}
SCALED_SUMS: dict[str, tuple[Code, bool]] = {
    "laguna": (lambda y, s, own, _: total(y, s).astype(y.dtype) * 2.5 + own, False),
    "Klear": (lambda y, s, own, f: total(y, s) * f + own * (1 - f), True),
    "both": (lambda y, s, own, f: total(y, s) * f * 3 + own, False),
}
APART: dict[str, Code] = {
    "times a vector": lambda y, s, own, f: total(y, s) * own[0, 0] + own,
    "times more than it has": lambda y, s, own, f: total(y, s) * f.astype(mx.float32) + own,
    "the other way round": lambda y, s, own, _: own + total(y, s),
    "llama4": lambda y, _, own, __: y[..., 0, :] + own,
    "less": lambda y, s, own, _: total(y, s) - own,
    "in float32": lambda y, s, own, f: total(y, s) + f.astype(mx.float32) * own,
    "one factor for each number": lambda y, s, own, f: total(y, s) + mx.broadcast_to(f, own.shape) * own,
    "half of it": lambda y, s, own, _: total(y, s)[:, :1] + own[:, :1],
    "more": lambda y, s, own, _: total(y, s) + (own + 1),
    "by a function": lambda y, s, own, _: mx.add(mx.array(total(y, s)), mx.array(own)),
}


class Shared:
    """An answer that counts how often it is asked for."""

    def __init__(self, x: mx.array) -> None:
        self.x = x
        self.answer = mx.random.normal(x.shape).astype(x.dtype)
        self.joined: list[bool] = []
        self.num_asked = 0

    def plain(self) -> mx.array:
        self.num_asked += 1
        return self.answer

    def is_joined(self, *, is_scaled: bool) -> None:
        self.joined.append(is_scaled)


class Experts:
    """A block that says what it was asked to sum."""

    def __init__(self) -> None:
        mx.random.seed(5)
        self.x = mx.zeros((1, T, HIDDEN), mx.bfloat16)
        self.y = mx.random.normal((1, T, K, HIDDEN)).astype(mx.bfloat16)
        self.shape, self.dtype = self.y.shape, self.y.dtype
        self.sums: list[tuple[Added | None, bool]] = []
        self.may = True

    def plain(self) -> mx.array:
        return self.y

    def summed(
        self, scores: mx.array, added: Added | None = None, factor: mx.array | None = None
    ) -> mx.array:
        self.sums.append((added, factor is not None))
        found = (self.y * scores[..., None]).sum(axis=-2)
        if added is None:
            return found
        return found + (added.plain() if factor is None else factor * added.plain())

    def see_added(self, added: Added) -> bool:
        return self.may and added.x is self.x


def factors(dtype: mx.Dtype = mx.bfloat16) -> tuple[mx.array, mx.array]:
    return mx.random.uniform(shape=(1, T, K)).astype(dtype), mx.random.uniform(shape=(1, T, 1)).astype(dtype)


def watch(code: Code, experts: Experts, shared: Shared) -> list[Use]:
    """What is seen; the answer must be that of ordinary arrays, bit for bit."""
    seen: list[Use] = []
    scores, factor = factors()
    found = code(watched(experts, seen.append), scores, watched_shared(shared), factor)
    assert mx.array_equal(found, code(experts.y, scores, shared.answer, factor))
    return seen


@pytest.mark.parametrize("name", JOINED)
def test_what_is_added_is_seen_and_then_joins_the_sum(name: str) -> None:
    code, use, is_scaled = JOINED[name]
    experts = Experts()
    shared = Shared(experts.x)
    assert watch(code, experts, shared)[-1] == use
    assert shared.joined == [is_scaled]
    scores, factor = factors()
    found = code(outputs(experts, use), scores, shared_outputs(shared, is_scaled=is_scaled), factor)
    assert isinstance(found, mx.array)
    assert mx.array_equal(found, code(experts.y, scores, shared.answer, factor))
    assert experts.sums == [(shared, is_scaled)]


@pytest.mark.parametrize("name", SCALED_SUMS)
def test_a_factor_of_the_sum_goes_to_the_scores(name: str) -> None:
    code, is_scaled = SCALED_SUMS[name]
    experts = Experts()
    shared = Shared(experts.x)
    assert watch(code, experts, shared)[-1].has_shared
    assert shared.joined == [is_scaled]
    scores, factor = factors()
    given = outputs(experts, Use(False, False, True)), shared_outputs(shared, is_scaled=is_scaled)
    found = code(given[0], scores, given[1], factor)
    wanted = code(experts.y, scores, shared.answer, factor)
    assert found.dtype == wanted.dtype
    assert mx.allclose(found, wanted, rtol=2e-2, atol=2e-2)
    assert experts.sums == [(shared, is_scaled)]


@pytest.mark.parametrize("name", APART)
def test_anything_else_is_seen_as_a_sum_alone(name: str) -> None:
    experts = Experts()
    shared = Shared(experts.x)
    assert not any(use.has_shared for use in watch(APART[name], experts, shared))
    assert shared.joined == []


@pytest.mark.parametrize("why", ["another x", "the block may not", "a sum in float32"])
def test_what_may_not_join_stays_apart(why: str) -> None:
    experts = Experts()
    shared = Shared(mx.zeros_like(experts.x) if why == "another x" else experts.x)
    experts.may = why != "the block may not"
    seen: list[Use] = []
    scores, _ = factors(mx.float32 if why == "a sum in float32" else mx.bfloat16)
    found = total(watched(experts, seen.append), scores) + watched_shared(shared)
    assert mx.array_equal(found, total(experts.y, scores) + shared.answer)
    assert seen == [Use(False, False)]
    assert shared.joined == []


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("name", [name for name in (*JOINED, *APART) if name != "by a function"])
def test_what_is_deferred_is_an_array_for_any_other_use(name: str, is_scaled: bool) -> None:
    """Code that joined them when it was watched may do something else later."""
    code = JOINED[name][0] if name in JOINED else APART[name]
    experts = Experts()
    shared = Shared(experts.x)
    scores, factor = factors()
    given = outputs(experts, Use(False, False, True)), shared_outputs(shared, is_scaled=is_scaled)
    found = code(given[0], scores, given[1], factor)
    assert mx.array_equal(found, code(experts.y, scores, shared.answer, factor))


def test_another_x_does_not_join_later_either() -> None:
    experts = Experts()
    shared = Shared(mx.zeros_like(experts.x))
    scores, _ = factors()
    found = total(outputs(experts, Use(False, False, True)), scores) + shared_outputs(shared, is_scaled=False)
    assert mx.array_equal(found, total(experts.y, scores) + shared.answer)
    assert experts.sums == [(None, False)]


def test_nothing_is_computed_of_an_answer_that_joins() -> None:
    experts = Experts()
    shared = Shared(experts.x)
    scores, _ = factors()
    y, own = outputs(experts, Use(False, True, True)), shared_outputs(shared, is_scaled=False)
    joining = total(y, scores).astype(y.dtype)
    assert (experts.sums, shared.num_asked) == ([], 0)
    mx.eval(joining + own)
    assert (experts.sums, shared.num_asked) == ([(shared, False)], 1)


def test_a_sum_in_float32_that_is_not_cast_does_not_join() -> None:
    experts = Experts()
    shared = Shared(experts.x)
    scores, _ = factors(mx.float32)
    found = total(outputs(experts, Use(False, True, True)), scores) + shared_outputs(shared, is_scaled=False)
    assert found.dtype == mx.float32
    assert experts.sums == [(None, False)]
