from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.codec import Tensor
from shard_loader.carry import MAX_DEPTH, CarryError, flatten, from_wire, to_wire, unflatten

DTYPES = [
    mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64,
    mx.float16, mx.bfloat16, mx.float32, mx.complex64,
]  # fmt: skip


def bits(x: mx.array) -> bytes:
    return bytes(memoryview(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 8), (5,), (), (1, 0, 4)], ids=str)
def test_every_dtype_and_shape_survives_the_wire(dtype: Any, shape: tuple[int, ...]) -> None:
    x = (mx.arange(int(np.prod(shape))).reshape(shape) * 3 - 7).astype(dtype)
    mx.eval(x)
    y = from_wire(to_wire(x))
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert bits(y) == bits(x)


def test_all_bfloat16_bit_patterns_survive_the_wire() -> None:
    """NaN payloads, infinities, subnormals and both zeros included."""
    raw = np.arange(65536, dtype=np.uint16).tobytes()
    tensor = Tensor("bfloat16", (1, 256, 256), raw)
    x = from_wire(tensor)
    assert x.dtype == mx.bfloat16
    assert to_wire(x).data == raw


def test_a_view_is_sent_in_row_order() -> None:
    x = mx.arange(24).reshape(2, 3, 4)
    for view in (x.transpose(2, 0, 1), x[:, ::2], mx.broadcast_to(x[:, :1], (2, 3, 4))):
        mx.eval(view)
        tensor = to_wire(view)
        assert tensor.shape == view.shape
        assert from_wire(tensor).tolist() == view.tolist()


def test_a_received_array_may_be_a_memoryview_of_a_longer_message() -> None:
    message = b"xy" + np.arange(4, dtype=np.float32).tobytes() + b"z"
    x = from_wire(Tensor("float32", (2, 2), memoryview(message)[2:-1]))
    assert x.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_a_wrong_dtype_or_length_is_refused() -> None:
    with pytest.raises(CarryError, match="unknown dtype 'float8' in a carry"):
        from_wire(Tensor("float8", (1,), b"x"))
    with pytest.raises(CarryError, match=r"a float32 tensor of shape \[2, 2\] has 15 bytes, not 16"):
        from_wire(Tensor("float32", (2, 2), b"x" * 15))


A, B, C = mx.array([1.0]), mx.array([2.0]), mx.array([3.0])
NESTED = [
    A,
    (A, B),
    [A],
    (A, None, [B, (C,)]),
    {"h": A, "streams": [B, C], "block": 3, "eps": 1e-5, "name": "x", "on": True, "none": None},
    (),
    None,
]


@pytest.mark.parametrize("carry", NESTED, ids=range(len(NESTED)))
def test_a_nested_carry_comes_back_as_it_was(carry: Any) -> None:
    arrays, structure = flatten(carry)
    copies = [x + 0 for x in arrays]
    back = unflatten(copies, structure)
    again, same = flatten(back)
    assert same == structure
    assert type(back) is type(carry)
    assert all(x is y for x, y in zip(again, copies, strict=True))
    if not isinstance(carry, mx.array):
        assert unflatten(arrays, structure) == carry


def test_one_array_needs_no_structure() -> None:
    arrays, structure = flatten(A)
    assert structure == ""
    assert arrays == [A]
    assert unflatten([A], "") is A


@pytest.mark.parametrize(
    ("structure", "num_arrays", "message"),
    [
        ("", 2, "a carry without structure is one array, not 2"),
        ('["t","*","*"]', 1, "names more arrays than came with it"),
        ('["t","*"]', 2, "names fewer than its 2 arrays"),
        ("(1,2)", 1, "is not JSON"),
        ("__import__('os')", 1, "is not JSON"),
        ('["x","*"]', 1, "which means nothing"),
        ("[]", 0, "which means nothing"),
        ("7", 0, "which means nothing"),
        ("true", 0, "which means nothing"),
        ('{"d":1}', 0, "which means nothing"),
        ('["s",[1]]', 0, "which means nothing"),
        ('["s",1e999]', 0, "which means nothing"),
        ('["s",NaN]', 0, "is not JSON"),
        (f'["s",{10**30}]', 0, "which means nothing"),
        ('["s","' + "x" * 65 + '"]', 0, "which means nothing"),
        ('["d",["a","*"],["a","*"]]', 2, "not a key and a value"),
        ('["d",[1,"*"]]', 1, "not a key and a value"),
        ('["d","*"]', 1, "not a key and a value"),
        ('["t",' * 30 + "null" + "]" * 30, 0, "nests deeper than"),
        ("[" * 10_000, 0, "is not JSON"),
        ('["t"' + ',"*"' * 8000 + "]", 0, "characters; the limit is"),
    ],
)
def test_a_wrong_structure_is_refused(structure: str, num_arrays: int, message: str) -> None:
    with pytest.raises(CarryError, match=message):
        unflatten([mx.array(0.0)] * num_arrays, structure)


def test_carries_that_cannot_cross_are_refused() -> None:
    deep: Any = A
    for _ in range(MAX_DEPTH + 2):
        deep = (deep,)
    with pytest.raises(CarryError, match="nests deeper"):
        flatten(deep)
    with pytest.raises(CarryError, match="holds a set"):
        flatten((A, {1}))
    with pytest.raises(CarryError, match="keys are not short strings"):
        flatten({1: A})
    with pytest.raises(CarryError, match="the scalar nan"):
        flatten((A, float("nan")))
    with pytest.raises(CarryError, match="the carry has 5000 arrays"):
        flatten([A] * 5000)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_nothing_from_the_wire_raises_anything_else(structure: str) -> None:
    with suppress(CarryError):
        unflatten([mx.array(0.0)], structure)
