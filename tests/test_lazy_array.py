"""What stands for an array behaves like one: asked what it is, read by NumPy, and changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.expert_outputs import Use, outputs, watched
from kernels.lazy_array import Lazy
from kernels.shared_outputs import SharedAnswer, shared_outputs, watched_shared
from tests.test_shared_outputs import Experts, Shared, factors, total


class Twos(Lazy):
    def _make(self) -> mx.array:
        return mx.full((3,), 2.0)


def test_numpy_reads_it_as_an_array() -> None:
    assert np.array(Twos()).tolist() == [2.0, 2.0, 2.0]
    assert np.array(Twos(), copy=True).tolist() == [2.0, 2.0, 2.0]


def with_(change: Callable[[Any], Any], what: Any) -> Any:
    """`what`, of which another name was changed in place."""
    other = what
    change(other)
    return what


def add(given: Any) -> None:
    given += 1


def scale(given: Any) -> None:
    given *= 0.5


def cut(given: Any) -> None:
    given[..., 0] = 0


@pytest.mark.parametrize("change", [add, scale, cut])
def test_all_its_names_have_a_change(change: Callable[[Any], Any]) -> None:
    assert mx.array_equal(mx.array(with_(change, Twos())), with_(change, mx.full((3,), 2.0)))


# y (1, T, k, hidden), scores (1, T, k), a shared expert's answer (1, T, hidden), factor (1, T, 1), a change
CHANGED: dict[str, Callable[[Any, mx.array, Any, mx.array, Any], Any]] = {
    "outputs": lambda y, s, own, _, c: total(with_(c, y), s) + own,
    "outputs behind their scores": lambda y, s, own, _, c: (s[..., None] * with_(c, y)).sum(-2) + own,
    "the product": lambda y, s, own, _, c: with_(c, y * s[..., None]).sum(axis=-2) + own,
    "the sum": lambda y, s, own, _, c: with_(c, total(y, s)) + own,
    "the sum before its factor": lambda y, s, own, f, c: with_(c, total(y, s)) * f + own,
    "the sum behind its factor": lambda y, s, own, f, c: with_(c, total(y, s) * 2) + own,
    "the sum before its cast": lambda y, s, own, _, c: with_(c, total(y, s)).astype(y.dtype) + own,
    "the cast sum": lambda y, s, own, _, c: with_(c, total(y, s).astype(y.dtype)) + own,
    "the answer": lambda y, s, own, _, c: total(y, s) + with_(c, own),
    "the answer before its factor": lambda y, s, own, f, c: total(y, s) + f * with_(c, own),
    "the answer behind its factor": lambda y, s, own, f, c: total(y, s) + with_(c, own * f),
}


@pytest.mark.parametrize("change", [add, scale, cut])
@pytest.mark.parametrize("name", CHANGED)
def test_what_is_changed_in_place_is_never_fused_as_if_it_were_not(
    name: str, change: Callable[[Any], Any]
) -> None:
    """Neither where it is watched nor where it was deferred."""
    experts = Experts()
    shared = Shared(experts.x)
    scores, factor = factors()
    before = mx.array(experts.y), mx.array(shared.answer)
    code = CHANGED[name]

    def made(y: Any, own: Any) -> mx.array:
        return mx.array(code(y, scores, own, factor, change))

    wanted = made(mx.array(before[0]), mx.array(before[1]))
    seen: list[Use] = []
    assert mx.array_equal(made(watched(experts, seen.append), watched_shared(shared)), wanted)
    assert not any(use.has_shared for use in seen)
    assert shared.joined == []
    for use in (Use(False, False, True), Use(True, False, True), Use(False, True, True), Use(False, True)):
        for is_scaled in (False, True):
            experts.y, shared.answer = mx.array(before[0]), mx.array(before[1])
            given = outputs(experts, use), shared_outputs(shared, is_scaled=is_scaled)
            assert mx.array_equal(made(*given), wanted)


def test_an_answer_that_was_read_before_joins_no_sum() -> None:
    experts = Experts()
    shared = Shared(experts.x)
    scores, _ = factors()
    own = shared_outputs(shared, is_scaled=False)
    assert type(own) is SharedAnswer
    float(own.sum())
    found = total(outputs(experts, Use(False, False, True)), scores) + own
    assert mx.array_equal(found, total(experts.y, scores) + shared.answer)
    assert experts.sums == [(None, False)]
