"""What a taken-over expert layer returns, so that the weighted sum in the model's own code is fused too.

mlx-lm's models call `y = switch(x, indices)` and then write `(y * scores[..., None]).sum(axis=-2)`, some with
the factors the other way round, some with a cast behind it. The first call of a shape returns an ordinary
array that watches what is done with it. Where that was such a sum, later calls of the same shape return an
object that holds nothing yet: multiplied and summed it becomes one fused result, and for any other use the
experts' outputs are computed and it behaves like that array. Only MLX's functions, unlike its operators, want
a real array: code that calls one at a shape at which it was seen to sum raises TypeError. What mlx-lm's code
does at one shape does not change.

Where the model then adds what its shared expert makes of the same x, as it is or times one factor a token,
that is seen and deferred in the same way, and joins the sum. Thread: the one that owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx

from kernels.lazy_array import Changeable, Lazy
from kernels.shared_outputs import Added, SharedAnswer, WatchedScaled, WatchedShared


@dataclass(frozen=True, slots=True)
class Use:
    """A weighted sum in a model's code.

    is_reflected: scores * y instead of y * scores; is_cast_back: the sum is cast to what y has; has_shared: a
    shared expert's answer is added to it.
    """

    is_reflected: bool
    is_cast_back: bool
    has_shared: bool = False


Record = Callable[[Use], None]


class Block(Protocol):
    """One call of an expert layer, of which nothing is computed yet."""

    x: mx.array  # (..., hidden)
    shape: tuple[int, ...]  # (..., k, hidden) of the outputs
    dtype: mx.Dtype

    def plain(self) -> mx.array:
        """The outputs."""
        ...

    def summed(
        self, scores: mx.array, added: Added | None = None, factor: mx.array | None = None
    ) -> mx.array:
        """(..., hidden) in `dtype`: the outputs times scores (..., k), summed over k.

        And `added`, times factor (..., 1) where there is one.
        """
        ...

    def see_added(self, added: Added) -> bool:
        """The model adds it to the weighted sum. Returns whether `summed` is to take it."""
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


class _Watched(Changeable):
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
        if self.is_changed or not _weighs(self._block, other):
            return product
        return _WatchedProduct(product, self._block, Use(is_reflected, False), self._record)


class _WatchedProduct(Changeable):
    def __init__(self, product: mx.array, block: Block, use: Use, record: Record) -> None:
        super().__init__(product)
        self._block, self._use, self._record = block, use, record

    def sum(self, axis: Any = None, keepdims: bool = False, **options: Any) -> mx.array:
        total = mx.array.sum(self, axis, keepdims, **options)
        if self.is_changed or keepdims or options or not _is_over_experts(axis, self.ndim):
            return total
        return _WatchedSum(total, self._block, self._use, self._record)


class _WatchedSum(Changeable):
    def __init__(self, total: mx.array, block: Block, use: Use, record: Record) -> None:
        super().__init__(total)
        self._block, self._use, self._record = block, use, record
        record(use)

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        cast = mx.array.astype(self, dtype, stream)
        if self.is_changed:
            return cast
        use = replace(self._use, is_cast_back=dtype == self._block.dtype)
        return _WatchedSum(cast, self._block, use, self._record)

    def __mul__(self, factor: Any) -> mx.array:
        product = mx.array.__mul__(self, factor)
        if self.is_changed or not _is_factor(self._block, factor):
            return product
        return _WatchedSum(product, self._block, self._use, self._record)

    def __add__(self, other: Any) -> mx.array:
        if isinstance(other, WatchedShared | WatchedScaled) and not (self.is_changed or other.is_changed):
            self._join(other.added, is_scaled=isinstance(other, WatchedScaled))
        return mx.array.__add__(self, other)

    def _join(self, added: Added, *, is_scaled: bool) -> None:
        if self.dtype == self._block.dtype and self._block.see_added(added):
            self._record(replace(self._use, has_shared=True))
            added.is_joined(is_scaled=is_scaled)


# -- later calls: nothing is computed before it is known what for -----------------------------------------


class _Deferred(Lazy):
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


class _Product(Lazy):
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
    dtype = _product_dtype(block.dtype, weights.dtype)
    if use.has_shared:
        return _Joining(block, weights, dtype)
    total = block.summed(weights.squeeze(-1))
    if dtype == block.dtype:
        return total
    return _Sum(total, dtype) if use.is_cast_back else total.astype(dtype)


class _Sum(Lazy):
    """The weighted sum, (..., hidden), of which a cast to another type than the product's is expected."""

    def __init__(self, total: mx.array, dtype: mx.Dtype) -> None:
        self._total, self.dtype = total, dtype

    def _make(self) -> mx.array:
        return self._total.astype(self.dtype)

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        return (self._total if self._made is None else self._made).astype(dtype, stream)


class _Joining(Lazy):
    """The weighted sum, (..., hidden), to which a shared expert's answer is expected to be added."""

    def __init__(self, block: Block, weights: mx.array, dtype: mx.Dtype) -> None:
        self._block, self._weights, self.dtype = block, weights, dtype

    def _make(self) -> mx.array:
        return self._block.summed(self._weights.squeeze(-1)).astype(self.dtype)

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> Any:
        if self._made is None and dtype == self._block.dtype:
            return _Joining(self._block, self._weights, dtype)
        return self.__mlx_array__().astype(dtype, stream)

    def __mul__(self, factor: Any) -> Any:
        if self._made is not None or not _is_factor(self._block, factor):
            return self.__mlx_array__() * factor
        each = factor[..., None] if isinstance(factor, mx.array) else factor  # (..., 1, 1)
        return _Joining(self._block, self._weights * each, self.dtype)

    def __add__(self, other: Any) -> mx.array:
        if (
            isinstance(other, SharedAnswer)
            and not other.is_made
            and self._made is None
            and self.dtype == self._block.dtype
            and other.added.x is self._block.x
        ):
            return self._block.summed(self._weights.squeeze(-1), other.added, other.factor)
        total: mx.array = self.__mlx_array__() + other
        return total


class _Reflected(Changeable):
    """As _Deferred, where the scores are the left factor: Python asks only a kind of array first."""

    def __init__(self, block: Block, use: Use) -> None:
        super().__init__(block.plain())  # lazy: nothing evaluates it where the sum is fused
        self._block, self._use = block, use

    def __rmul__(self, other: Any) -> Any:
        if not self.is_changed and _weighs(self._block, other):
            return _Product(self._block, self._use, other)
        return mx.array.__rmul__(self, other)


def _is_factor(block: Block, factor: Any) -> bool:
    """Whether a sum's scores may take it: one number for all tokens, or one for each in the outputs' type."""
    if isinstance(factor, mx.array):
        return factor.shape == (*block.x.shape[:-1], 1) and factor.dtype == block.dtype
    return isinstance(factor, int | float)


def _is_over_experts(axis: Any, ndim: int) -> bool:
    return axis in (-2, ndim - 2)


@lru_cache
def _product_dtype(a: mx.Dtype, b: mx.Dtype) -> mx.Dtype:
    return (mx.zeros((1,), a) * mx.zeros((1,), b)).dtype
