"""What a model's own code may do with the outputs of its experts, watched and deferred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from kernels.expert_outputs import Use, outputs, watched

T, K, HIDDEN = 3, 2, 8
Code = Callable[[Any, mx.array], Any]  # y (1, T, k, hidden), scores (1, T, k)

SUMS: dict[str, tuple[Code, Use]] = {
    "mixtral": (lambda y, s: (y * s[..., None]).sum(axis=-2), Use(False, False)),
    "deepseek_v3": (lambda y, s: (y * s[..., None]).sum(axis=-2).astype(y.dtype), Use(False, True)),
    "gpt_oss": (lambda y, s: (y * mx.expand_dims(s, axis=-1)).sum(axis=-2), Use(False, False)),
    "gemma4_text": (lambda y, s: (mx.expand_dims(s, -1) * y).sum(-2), Use(True, False)),
    "by its number": (lambda y, s: (y * s[..., None]).sum(axis=2), Use(False, False)),
}
OTHERS: dict[str, Code] = {
    "longcat_flash": lambda y, s: mx.sum(y * s[..., None], axis=-2),
    "deepseek_v41": lambda y, s: mx.sum(y.astype(mx.float32) * s[..., None].astype(mx.float32), axis=2),
    "llama4": lambda y, _: y.squeeze(0),
    "another axis": lambda y, s: (y * s[..., None]).sum(axis=-1),
    "with its axis kept": lambda y, s: (y * s[..., None]).sum(axis=-2, keepdims=True),
    "one factor": lambda y, _: (y * 2.0).sum(axis=-2),
    "another factor": lambda y, s: (y * s[..., :1, None]).sum(axis=-2),
    "bailing_moe": mx.compile(lambda y, s: (y * s[..., None]).sum(axis=-2)),
}
NEED_ARRAYS = ("bailing_moe", "longcat_flash")  # what MLX's functions are given must be one


class Experts:
    """A block that counts what is asked of it."""

    def __init__(self, dtype: mx.Dtype = mx.bfloat16) -> None:
        mx.random.seed(3)
        self.y = mx.random.normal((1, T, K, HIDDEN)).astype(dtype)
        self.asked: list[str] = []
        self.shape, self.dtype = (1, T, K, HIDDEN), dtype

    def plain(self) -> mx.array:
        self.asked.append("plain")
        return self.y

    def summed(self, scores: mx.array) -> mx.array:
        self.asked.append("summed")
        assert scores.shape == (1, T, K)
        total = (self.y.astype(mx.float32) * scores[..., None].astype(mx.float32)).sum(axis=-2)
        return total.astype(self.y.dtype)


def scores_of(dtype: mx.Dtype) -> mx.array:
    return mx.random.uniform(shape=(1, T, K)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("name", SUMS)
def test_weighted_sums_are_seen_and_then_fused(name: str, dtype: mx.Dtype) -> None:
    code, use = SUMS[name]
    experts, scores = Experts(), scores_of(dtype)
    wanted = code(experts.y, scores)
    seen: list[Use] = []
    first = code(watched(experts, seen.append), scores)
    assert mx.array_equal(first, wanted)
    assert seen[-1] == use
    experts.asked.clear()
    found = code(outputs(experts, use), scores)
    assert isinstance(found, mx.array)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert mx.allclose(found, wanted, rtol=2e-2, atol=2e-2)
    assert experts.asked == (["plain"] if use.is_reflected else []) + ["summed"]  # that plain one is lazy


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_left_alone(name: str) -> None:
    experts, scores = Experts(), scores_of(mx.float32)
    seen: list[Use] = []
    assert mx.array_equal(
        OTHERS[name](watched(experts, seen.append), scores), OTHERS[name](experts.y, scores)
    )
    assert seen == []


@pytest.mark.parametrize("is_reflected", [False, True])
@pytest.mark.parametrize(
    "code",
    [
        *(OTHERS[name] for name in OTHERS if name not in NEED_ARRAYS),
        lambda y, _: y + 1,
        lambda y, _: 1 - y,
        lambda y, s: s[..., None] + y,
        lambda y, _: -y[..., :1],
        lambda y, _: mx.array(y),
        lambda y, s: (y * s[..., None]) + 1,
        lambda y, s: (y * s[..., None]).reshape(-1),
        lambda y, _: mx.stack(list(y)),
    ],
)
def test_what_is_deferred_is_an_array_for_any_other_use(code: Code, is_reflected: bool) -> None:
    """Code that did a weighted sum when it was watched may do something else later."""
    experts, scores = Experts(), scores_of(mx.float32)
    found = code(outputs(experts, Use(is_reflected, False)), scores)
    assert mx.array_equal(found, code(experts.y, scores))
    assert experts.asked == ["plain"]


def test_a_sum_whose_cast_does_not_come_is_the_products() -> None:
    experts, scores = Experts(), scores_of(mx.float32)
    y = outputs(experts, Use(False, True))
    total = (y * scores[..., None]).sum(axis=-2)
    assert total.dtype == mx.float32
    assert (total + 1).dtype == mx.float32
    assert total.astype(mx.float16).dtype == mx.float16
    assert experts.asked == ["summed"]


def test_the_outputs_are_computed_once() -> None:
    experts = Experts()
    y = outputs(experts, Use(False, False))
    assert (y.shape, y.dtype, y.ndim) == ((1, T, K, HIDDEN), mx.bfloat16, 4)
    assert experts.asked == []
    assert mx.array_equal(y + y, experts.y + experts.y)
    assert experts.asked == ["plain"]
    with pytest.raises(AttributeError):
        _ = y.__no_such_thing__
