"""A stage's next decode step, built while it waits: on placeholders, whose bytes are written when they come.

Building advances what the caches count, and replaces their lazy arrays. So handles of all that are taken
before, and put back where another step comes than the one that was built. They are let go before the step is
evaluated, for an array with a second handle would be copied and not be written in place. A step that was even
handed over to the device, behind a latch, goes back as a wrong guess does.
Compute thread only, but for `begin`.
"""

from __future__ import annotations

import io
import math
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList

from proto.codec import Tensor
from shard_loader.batch_state import BatchState
from shard_loader.carry import unflatten
from shard_loader.host_arrays import HostArrays, place
from shard_loader.latch import Latch
from shard_loader.merging import handles
from shard_loader.shard import Shard
from shard_loader.state import ShardState

Kind = tuple[tuple[str, tuple[int, ...]], ...]  # of a carry: dtype and shape of each tensor


def kind_of(carry: Sequence[Tensor]) -> Kind:
    """What a carry's placeholders look like."""
    return tuple((tensor.dtype, tensor.shape) for tensor in carry)


def kinds_of(num_rows: int, carry: Kind) -> Kind:
    """Of a step's placeholders: a token of each row, then the carry."""
    return (("int32", (num_rows, 1)), *carry)


class Saved:
    """A state as it is now."""

    def __init__(self, state: ShardState | BatchState) -> None:
        self._state = state
        self._position = state.position if isinstance(state, ShardState) else list(state.positions)
        self._caches = [(cache, handles(vars(cache))) for cache in _parts(state.own.values())]

    def restore(self) -> None:
        """The state is again as it was."""
        for cache, attributes in self._caches:
            vars(cache).clear()
            vars(cache).update(attributes)
        if isinstance(self._state, ShardState):
            assert isinstance(self._position, int)
            self._state.position = self._position
        else:
            assert isinstance(self._position, list)
            self._state.positions = self._position


def can_save(state: ShardState | BatchState) -> bool:
    """Whether all that its caches hold is known: they are mlx-lm's own."""
    return all(type(part).__module__ == mlx_lm_cache.__name__ for part in _parts(state.own.values()))


class ReadsNumbersError(ValueError):
    """The model's code looks at numbers while it builds: what it builds depends on them."""


class Ahead:
    """The forward pass of one more token of each row of `state`; evaluates nothing.

    carry: what the placeholders of the previous stage's carry look like, none on the first stage. latch: it
    may be handed over before its numbers are there. out: what `Shard.forward` returned. Raises
    ReadsNumbersError, with the state as it was.
    """

    def __init__(
        self,
        shard: Shard,
        state: ShardState | BatchState,
        num_rows: int,
        carry: Kind,
        structure: str,
        *,
        host: HostArrays,
        latch: Latch | None = None,
    ) -> None:
        self._saved: Saved | None = Saved(state)
        self._state, self._latch, self._is_handed_over = state, latch, False
        self._host = host
        self._places: list[memoryview] = []  # of a step that was handed over: where its numbers go
        self._begun_with: tuple[list[int], Sequence[Tensor]] | None = None
        self.began = math.inf  # perf_counter() when `begin` was called
        self._kinds = kinds_of(num_rows, carry)
        self._blanks = host.blanks(self._kinds)  # token ids, then the carry
        behind = self._blanks if latch is None else latch.behind(self._blanks)
        tokens, *arrays = given = [mx.stop_gradient(blank) for blank in behind]
        incoming = None if shard.is_first else unflatten(arrays, structure)
        with ExitStack() as failed:
            failed.callback(self.undo)
            self.out: Any = shard.forward(tokens, incoming, state)
            if not all(map(_is_lazy, given)):
                raise ReadsNumbersError("this model's code reads numbers while it builds a step")
            failed.pop_all()

    def hand_over(self, arrays: list[mx.array]) -> None:
        """The device gets the step, by all that is wanted of it: it waits at the latch."""
        assert self._latch is not None
        self._saved, self._is_handed_over = None, True
        self._places = [place(blank) for blank in self._blanks]
        self._latch.hand_over(arrays)

    def undo(self) -> None:
        """The state is as before; what was built is worth nothing any more."""
        saved, self._saved = self._saved, None
        try:
            if self._latch is not None:
                self._latch.abandon()
        finally:  # where the device fails, too: who goes on is at the right position, or learns of it
            if saved is not None:
                saved.restore()
            elif self._is_handed_over:
                self.forget()
        self._give_back()

    def fill(self, tokens: Sequence[int], carry: Sequence[Tensor]) -> Any:
        """The numbers are there: what `Shard.forward` would return for them, to be evaluated."""
        self._saved = None

        if not self.has_begun:
            self._let_begin(tokens, carry)
        if self._latch is not None and not self._is_handed_over:
            self._latch.give_back()
        self._places = []
        self._give_back()
        return self.out

    def begin(self, tokens: Sequence[int], carry: Sequence[Tensor]) -> None:
        """Any thread, once, before `fill` or `undo`: what was handed over begins with these numbers."""
        assert self._latch is not None
        if self._latch.may_open():
            self._let_begin(tokens, carry)
            self._begun_with, self.began = ([*tokens], [*carry]), time.perf_counter()

    @property
    def has_begun(self) -> bool:
        """Its numbers are there."""
        return self._begun_with is not None

    def suits(self, tokens: Sequence[int], carry: Sequence[Tensor]) -> bool:
        """Whether these are its numbers, or may be."""
        if self._begun_with is None:
            return True
        own_tokens, own_carry = self._begun_with
        is_same = own_tokens == [*tokens] and len(own_carry) == len(carry)
        return is_same and all(a is b for a, b in zip(own_carry, carry, strict=True))

    def _let_begin(self, tokens: Sequence[int], carry: Sequence[Tensor]) -> None:
        numbers = array("i", tokens).tobytes(), *(tensor.data for tensor in carry)
        places = self._places or [place(blank) for blank in self._blanks]

        def write_all() -> None:
            for where, data in zip(places, numbers, strict=True):
                where[:] = data

        write_all() if self._latch is None else self._latch.open(write_all)

    @property
    def can_wait(self) -> bool:
        """It may be handed over: there is a latch."""
        return self._latch is not None

    def was_open(self) -> bool:
        """It was handed over, filled and evaluated: whether filled in time."""
        assert self._latch is not None
        return self._latch.was_open()

    def forget(self) -> None:
        """It was handed over, and evaluated without its numbers: the state is as before."""
        assert isinstance(self._state, ShardState)
        self._state.rewind(self._state.position - 1)

    def _give_back(self) -> None:
        self._host.give_back(self._blanks, self._kinds)


def _is_lazy(array: mx.array) -> bool:
    """Whether an array of `mx.stop_gradient` has not been evaluated: it still knows what it is made of."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "StopGradient" in graph.getvalue()


def _parts(caches: Any) -> list[Any]:
    """The caches that hold arrays, those in lists of caches among them."""
    return [part for cache in caches for part in (cache.caches if type(cache) is CacheList else (cache,))]
