"""An object that behaves like an array and computes it at the first use that needs one.

Only MLX's functions, unlike its operators, want a real array, and isinstance is not deceived. An array can be
changed in place, and every name of it then has the change: so has every name of such an object. Thread: the
one that owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Lazy:
    """Behaves like the array that `_make` gives."""

    _made: mx.array | None = None

    def _make(self) -> mx.array:
        raise NotImplementedError

    def __mlx_array__(self) -> mx.array:  # what MLX asks an operand for
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__mlx_array__(), name)


def _forwarded(name: str) -> Callable[..., Any]:
    def forward(self: Lazy, *args: Any, **options: Any) -> Any:
        return getattr(self.__mlx_array__(), name)(*args, **options)

    return forward


class Changeable(mx.array):
    """An array that knows whether it was changed in place, and then is not what it was made as."""

    is_changed = False


def _changed(name: str) -> Callable[..., Any]:
    right = getattr(mx.array, name)

    def change(self: Lazy | Changeable, *args: Any) -> Any:
        if isinstance(self, Changeable):
            self.is_changed = True
            return right(self, *args)
        answer = right(self.__mlx_array__(), *args)
        return answer if answer is None else self

    return change


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_OTHERS = (
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r")),
    *("__neg__", "__abs__", "__getitem__", "__len__", "__iter__", "__bool__", "__array__", "__repr__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
)
for _name in _OTHERS:
    if hasattr(mx.array, _name):
        setattr(Lazy, _name, _forwarded(_name))
for _name in ("__setitem__", *(f"__i{operation}__" for operation in (*_BINARY, "and", "or", "xor"))):
    if hasattr(mx.array, _name):
        setattr(Lazy, _name, _changed(_name))
        setattr(Changeable, _name, _changed(_name))
Lazy.__hash__ = object.__hash__  # type: ignore[method-assign]
