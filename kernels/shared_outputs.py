"""What a taken-over shared expert returns, so that its answer can join the experts' weighted sum.

As in `expert_outputs`: the first call of a shape gives an array that watches, later ones may give what holds
nothing yet. Thread: the one that owns MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from kernels.lazy_array import Changeable, Lazy


class Added(Protocol):
    """One call of a shared expert, of which nothing is computed yet."""

    x: mx.array  # (..., hidden), of the answer's shape

    def plain(self) -> mx.array:
        """The answer."""
        ...

    def is_joined(self, *, is_scaled: bool) -> None:
        """It was added to the weighted sum of a block that may join it, times a factor or as it is."""
        ...


def answer(added: Added, factor: mx.array | None) -> mx.array:
    """What is added to the sum, (..., hidden); factor: (..., 1)."""
    return added.plain() if factor is None else factor * added.plain()


def _scales(added: Added, factor: Any) -> bool:
    """Whether it is one factor for each token: (..., 1) in the answer's type."""
    return (
        isinstance(factor, mx.array)
        and factor.shape == (*added.x.shape[:-1], 1)
        and factor.dtype == added.x.dtype
    )


def shared_outputs(added: Added, *, is_scaled: bool) -> Any:
    """What stands for the answer of a shared expert in code that is known to add it to a weighted sum."""
    return _ScalableShared(added) if is_scaled else SharedAnswer(added, None)


def watched_shared(added: Added) -> mx.array:
    """The answer of a shared expert; `added` is told when it joins a weighted sum."""
    return WatchedShared(added.plain(), added)


# -- the first call of a shape ----------------------------------------------------------------------------


class WatchedShared(Changeable):
    def __init__(self, answer: mx.array, added: Added) -> None:
        super().__init__(answer)
        self.added = added

    def __mul__(self, factor: Any) -> mx.array:
        return self._scaled(mx.array.__mul__(self, factor), factor)

    def __rmul__(self, factor: Any) -> mx.array:
        return self._scaled(mx.array.__rmul__(self, factor), factor)

    def _scaled(self, product: mx.array, factor: Any) -> mx.array:
        if self.is_changed or not _scales(self.added, factor):
            return product
        return WatchedScaled(product, self.added)


class WatchedScaled(Changeable):
    def __init__(self, product: mx.array, added: Added) -> None:
        super().__init__(product)
        self.added = added


# -- later calls ------------------------------------------------------------------------------------------


class SharedAnswer(Lazy):
    """A shared expert's answer, (..., hidden), times factor (..., 1) where there is one."""

    def __init__(self, added: Added, factor: mx.array | None) -> None:
        self.added, self.factor = added, factor

    @property
    def is_made(self) -> bool:
        """Then it is an array like any other, and may have been changed."""
        return self._made is not None

    def _make(self) -> mx.array:
        return answer(self.added, self.factor)


class _ScalableShared(Changeable):
    """The answer where a factor is expected at its left: Python asks only a kind of array first."""

    def __init__(self, added: Added) -> None:
        super().__init__(added.plain())  # lazy: nothing evaluates it where it joins a sum
        self._added = added

    def __mul__(self, factor: Any) -> Any:
        return self._scaled(factor, mx.array.__mul__)

    def __rmul__(self, factor: Any) -> Any:
        return self._scaled(factor, mx.array.__rmul__)

    def _scaled(self, factor: Any, multiply: Callable[[mx.array, Any], mx.array]) -> Any:
        if self.is_changed or not _scales(self._added, factor):
            return multiply(self, factor)
        return SharedAnswer(self._added, factor)
