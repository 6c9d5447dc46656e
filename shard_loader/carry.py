"""The carry: what crosses a cut, as a list of arrays and a string that says how they nest.

Most architectures hand one hidden state (1, T, hidden_size) to the next layer; some a tuple, a list of
streams or an object. `flatten` and `unflatten` turn any of them into arrays and back; `to_wire` and
`from_wire` turn evaluated arrays into bytes and back, bit for bit. Arrays belong to the compute thread: call
everything here from it alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from proto.codec import Tensor

MAX_STRUCTURE_CHARS = 16_384
MAX_DEPTH = 16
MAX_LEAVES = 1024
MAX_STRING_CHARS = 64
INT_LIMIT = 2**63

ARRAY = "*"

_NUMPY_DTYPES: dict[str, Any] = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "complex64": np.complex64,
}
_DTYPE_NAMES: dict[Any, str] = {
    getattr(mx, "bool_" if name == "bool" else name): name for name in _NUMPY_DTYPES
}


class CarryError(ValueError):
    """A carry that cannot be sent, or a structure string or tensor from the wire that makes no sense."""


def flatten(carry: Any) -> tuple[list[mx.array], str]:
    """The arrays of `carry`, depth first, and its structure: "" for a single array.

    Nested tuples, lists, dicts with string keys, None, booleans, numbers and short strings are structure;
    anything else raises CarryError.
    """
    if isinstance(carry, mx.array):
        return [carry], ""
    arrays: list[mx.array] = []
    node = _node(carry, arrays, 0)
    structure = json.dumps(node, separators=(",", ":"), allow_nan=False)
    if len(structure) > MAX_STRUCTURE_CHARS or len(arrays) > MAX_LEAVES:
        raise CarryError(f"the carry has {len(arrays)} arrays; at most {MAX_LEAVES} can cross a cut")
    return arrays, structure


def _node(value: Any, arrays: list[mx.array], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CarryError(f"the carry nests deeper than {MAX_DEPTH} levels")
    kind = type(value)
    if isinstance(value, mx.array):
        arrays.append(value)
        return ARRAY
    if value is None:
        return None
    if kind in (bool, int, float, str):
        if not _is_scalar(value):
            raise CarryError(f"the carry holds the scalar {value!r}, which cannot cross a cut")
        return ["s", value]
    if kind in (tuple, list):
        return ["t" if kind is tuple else "l", *(_node(item, arrays, depth + 1) for item in value)]
    if kind is dict:
        if not all(type(key) is str and len(key) <= MAX_STRING_CHARS for key in value):
            raise CarryError("the carry holds a dict whose keys are not short strings")
        return ["d", *([key, _node(item, arrays, depth + 1)] for key, item in value.items())]
    raise CarryError(f"the carry holds a {kind.__name__}, which cannot cross a cut")


def _is_scalar(value: Any) -> bool:
    if type(value) is bool:
        return True
    if type(value) is int:
        return -INT_LIMIT <= value < INT_LIMIT
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is str and len(value) <= MAX_STRING_CHARS


def unflatten(arrays: Sequence[mx.array], structure: str) -> Any:
    """The inverse of `flatten`. `structure` may come from a stranger: every wrong form raises CarryError."""
    if structure == "":
        if len(arrays) != 1:
            raise CarryError(f"a carry without structure is one array, not {len(arrays)}")
        return arrays[0]
    if len(structure) > MAX_STRUCTURE_CHARS:
        raise CarryError(
            f"a carry's structure has {len(structure)} characters; the limit is {MAX_STRUCTURE_CHARS}"
        )
    try:
        node = json.loads(structure, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CarryError("a carry's structure is not JSON") from error
    rest = iter(arrays)
    carry = _value(node, rest, 0)
    if next(rest, None) is not None:
        raise CarryError(f"a carry's structure names fewer than its {len(arrays)} arrays")
    return carry


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _value(node: Any, rest: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CarryError(f"a carry's structure nests deeper than {MAX_DEPTH} levels")
    if node == ARRAY:
        array = next(rest, None)
        if array is None:
            raise CarryError("a carry's structure names more arrays than came with it")
        return array
    if node is None:
        return None
    if type(node) is list and node:
        tag, items = node[0], node[1:]
        if tag == "s" and len(items) == 1 and _is_scalar(items[0]):
            return items[0]
        if tag == "t":
            return tuple(_value(item, rest, depth + 1) for item in items)
        if tag == "l":
            return [_value(item, rest, depth + 1) for item in items]
        if tag == "d":
            return _dict(items, rest, depth)
    raise CarryError(f"a carry's structure holds {str(node)[:40]!r}, which means nothing")


def _dict(items: list[Any], rest: Any, depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in items:
        if type(item) is not list or len(item) != 2 or type(item[0]) is not str or item[0] in out:
            raise CarryError("a carry's structure holds a dict entry that is not a key and a value")
        out[item[0]] = _value(item[1], rest, depth + 1)
    return out


def to_wire(x: mx.array) -> Tensor:
    """The bytes of an evaluated array in row order, as a view that keeps it alive: no copy.

    Only an array whose rows do not follow each other in memory is copied. Raises CarryError for an unknown
    dtype.
    """
    name = dtype_name(x)
    view = memory(x)
    if not view.c_contiguous:
        x = mx.contiguous(x)
        mx.eval(x)
        view = memory(x)
    return Tensor(name, tuple(x.shape), view.cast("B") if x.size else b"")


def dtype_name(x: mx.array) -> str:
    """As tensors have it; raises CarryError for one that they cannot have."""
    name = _DTYPE_NAMES.get(x.dtype)
    if name is None:
        raise CarryError(f"arrays of {x.dtype} cannot cross a cut")
    return name


def memory(x: Any) -> memoryview:
    """Its buffer, which can be written; type stubs do not say that MLX arrays have one."""
    return memoryview(x)


def from_wire(tensor: Tensor) -> mx.array:
    """An array of the tensor's dtype and shape with the same bits; one copy.

    Raises CarryError for an unknown dtype or a number of bytes that does not fit the shape.
    """
    dtype = _NUMPY_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CarryError(f"unknown dtype {tensor.dtype!r} in a carry")
    expected = math.prod(tensor.shape) * np.dtype(dtype).itemsize
    if len(tensor.data) != expected:
        raise CarryError(
            f"a {tensor.dtype} tensor of shape {list(tensor.shape)} has {len(tensor.data)} bytes, "
            f"not {expected}"
        )
    return mx.array(np.frombuffer(tensor.data, dtype).reshape(tensor.shape))
