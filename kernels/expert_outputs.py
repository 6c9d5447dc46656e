"""What a taken-over expert layer returns, so that the weighted sum in the model's own code is fused too.

mlx-lm's models call `y = switch(x, indices)` and then write `(y * scores[..., None]).sum(axis=-2)`, some with
the factors the other way round, some with a cast behind it. The first call of a shape returns an ordinary
array that watches what is done with it. Where that was such a sum, later calls of the same shape return an
object that holds nothing yet: multiplied and summed it becomes one fused result, and for any other use the
experts' outputs are computed and it behaves like that array. Only MLX's functions, unlike its operators, want
a real array: code that calls one at a shape at which it was seen to sum raises TypeError. What mlx-lm's code
does at one shape does not change. Thread: the one that owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Use:
    """A weighted sum in a model's code.

    is_reflected: scores * y instead of y * scores; is_cast_back: the sum is cast to what y has.
    """

    is_reflected: bool
    is_cast_back: bool


Record = Callable[[Use], None]


class Block(Protocol):
    """One call of an expert layer, of which nothing is computed yet."""

    shape: tuple[int, ...]  # (..., k, hidden) of the outputs
    dtype: mx.Dtype

    def plain(self) -> mx.array:
        """The outputs."""
        ...

    def summed(self, scores: mx.array) -> mx.array:
        """(..., hidden) in `dtype`: the outputs times scores (..., k), summed over k."""
        ...


def _weighs(block: Block, other: Any) -> bool:
    """Whether `other` is one factor for each expert: (..., k, 1) of floats."""
    return (
        isinstance(other, mx.array)
        and other.shape == (*block.shape[:-1], 1)
        and mx.issubdtype(other.dtype, mx.floating)
    )


def outputs(block: Block, use: Use) -> Any:
    """What stands for the outputs of `block` in code that is known to make `use` of them."""
    return _Reflected(block, use) if use.is_reflected else _Deferred(block, use)


def watched(block: Block, record: Record) -> mx.array:
    """The outputs of `block`; `record` is called if they are weighted and summed."""
    return _Watched(block, record)


# -- the first call of a shape: real arrays ---------------------------------------------------------------


class _Watched(mx.array):
    def __init__(self, block: Block, record: Record) -> None:
        super().__init__(block.plain())
        self._block, self._record = block, record

    def __mul__(self, other: Any) -> mx.array:
        product = mx.array.__mul__(self, other)
        return self._weighted(product, other, is_reflected=False)

    def __rmul__(self, other: Any) -> mx.array:
        product = mx.array.__rmul__(self, other)
        return self._weighted(product, other, is_reflected=True)

    def _weighted(self, product: mx.array, other: Any, *, is_reflected: bool) -> mx.array:
        if not _weighs(self._block, other):
            return product
        return _WatchedProduct(product, self._block.dtype, lambda cast: self._record(Use(is_reflected, cast)))


class _WatchedProduct(mx.array):
    def __init__(self, product: mx.array, dtype: mx.Dtype, record: Callable[[bool], None]) -> None:
        super().__init__(product)
        self._dtype, self._record = dtype, record

    def sum(self, axis: Any = None, keepdims: bool = False, **options: Any) -> mx.array:
        total = mx.array.sum(self, axis, keepdims, **options)
        if keepdims or options or not _is_over_experts(axis, self.ndim):
            return total
        self._record(False)
        return _WatchedSum(total, self._dtype, self._record)


class _WatchedSum(mx.array):
    def __init__(self, total: mx.array, dtype: mx.Dtype, record: Callable[[bool], None]) -> None:
        super().__init__(total)
        self._dtype, self._record = dtype, record

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        self._record(dtype == self._dtype)
        return mx.array.astype(self, dtype, stream)


# -- later calls: nothing is computed before it is known what for -----------------------------------------


class _Lazy:
    """Behaves like the array that `_make` gives, which is called at the first use that needs one."""

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
    def forward(self: _Lazy, *args: Any) -> Any:
        return getattr(self.__mlx_array__(), name)(*args)

    return forward


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_OTHERS = (
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r")),
    *("__neg__", "__abs__", "__getitem__", "__len__", "__iter__", "__bool__", "__array__", "__repr__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
)
for _name in _OTHERS:
    if hasattr(mx.array, _name):
        setattr(_Lazy, _name, _forwarded(_name))
_Lazy.__hash__ = object.__hash__  # type: ignore[method-assign]


class _Deferred(_Lazy):
    """The experts' outputs, (..., k, hidden)."""

    def __init__(self, block: Block, use: Use) -> None:
        self._block, self._use = block, use
        self.shape, self.dtype, self.ndim = block.shape, block.dtype, len(block.shape)

    def _make(self) -> mx.array:
        return self._block.plain()

    def __mul__(self, other: Any) -> Any:
        if self._made is None and _weighs(self._block, other):
            return _Product(self._block, self._use, other)
        return self.__mlx_array__() * other


class _Product(_Lazy):
    """The outputs times their scores, (..., k, hidden)."""

    def __init__(self, block: Block, use: Use, weights: mx.array) -> None:
        self._block, self._use, self._weights = block, use, weights

    def _make(self) -> mx.array:
        return self._block.plain() * self._weights

    def sum(self, axis: Any = None, keepdims: bool = False, **options: Any) -> Any:
        if (
            keepdims
            or options
            or self._made is not None
            or not _is_over_experts(axis, len(self._block.shape))
        ):
            return self.__mlx_array__().sum(axis, keepdims, **options)
        return _sum(self._block, self._use, self._weights)


def _sum(block: Block, use: Use, weights: mx.array) -> Any:
    total = block.summed(weights.squeeze(-1))
    dtype = _product_dtype(block.dtype, weights.dtype)
    if dtype == block.dtype:
        return total
    return _Sum(total, dtype) if use.is_cast_back else total.astype(dtype)


class _Sum(_Lazy):
    """The weighted sum, (..., hidden), of which a cast to another type than the product's is expected."""

    def __init__(self, total: mx.array, dtype: mx.Dtype) -> None:
        self._total, self.dtype = total, dtype

    def _make(self) -> mx.array:
        return self._total.astype(self.dtype)

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        return self._total.astype(dtype, stream)


class _Reflected(mx.array):
    """As _Deferred, where the scores are the left factor: Python asks only a kind of array first."""

    def __init__(self, block: Block, use: Use) -> None:
        super().__init__(block.plain())  # lazy: nothing evaluates it where the sum is fused
        self._block, self._use = block, use

    def __rmul__(self, other: Any) -> Any:
        if _weighs(self._block, other):
            return _Product(self._block, self._use, other)
        return mx.array.__rmul__(self, other)


def _is_over_experts(axis: Any, ndim: int) -> bool:
    return axis in (-2, ndim - 2)


@lru_cache
def _product_dtype(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return (mx.zeros((1,), a) * mx.zeros((1,), b)).dtype
