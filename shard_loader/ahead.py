"""A stage's next decode step, built while it waits: on placeholders, whose bytes are written when they come.

Building advances what the caches count, and replaces their lazy arrays. So handles of all that are taken
before, and put back where another step comes than the one that was built. They are let go before the step is
evaluated, for an array with a second handle would be copied and not be written in place.
Compute thread only.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList

from proto.codec import Tensor
from shard_loader.batch_state import BatchState
from shard_loader.carry import unflatten
from shard_loader.host_arrays import HostArrays, write
from shard_loader.merging import handles
from shard_loader.shard import Shard
from shard_loader.state import ShardState

Kind = tuple[tuple[str, tuple[int, ...]], ...]  # of a carry: dtype and shape of each tensor


def kind_of(carry: Sequence[Tensor]) -> Kind:
    """What a carry's placeholders look like."""
    return tuple((tensor.dtype, tensor.shape) for tensor in carry)


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

    carry: what the placeholders of the previous stage's carry look like, none on the first stage. out: what
    `Shard.forward` returned. Raises ReadsNumbersError, with the state as it was.
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
    ) -> None:
        self._saved: Saved | None = Saved(state)
        self._host = host
        self._kinds: Kind = (("int32", (num_rows, 1)), *carry)
        self._tokens, *self._arrays = host.blanks(self._kinds)
        tokens, *arrays = given = [mx.stop_gradient(array) for array in (self._tokens, *self._arrays)]
        incoming = None if shard.is_first else unflatten(arrays, structure)
        with ExitStack() as failed:
            failed.callback(self.undo)
            self.out: Any = shard.forward(tokens, incoming, state)
            if not all(map(_is_lazy, given)):
                raise ReadsNumbersError("this model's code reads numbers while it builds a step")
            failed.pop_all()

    def undo(self) -> None:
        """The state is as before; what was built is worth nothing any more."""
        saved, self._saved = self._saved, None
        if saved is not None:
            saved.restore()
            self._give_back()

    def fill(self, tokens: Sequence[int], carry: Sequence[Tensor]) -> Any:
        """The numbers are there: what `Shard.forward` would return for them, to be evaluated."""
        self._saved = None
        write(self._tokens, np.array(tokens, np.int32).tobytes())
        for array, tensor in zip(self._arrays, carry, strict=True):
            write(array, tensor.data)
        self._give_back()
        return self.out

    def _give_back(self) -> None:
        self._host.give_back([self._tokens, *self._arrays], self._kinds)


def _is_lazy(array: mx.array) -> bool:
    """Whether an array of `mx.stop_gradient` has not been evaluated: it still knows what it is made of."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "StopGradient" in graph.getvalue()


def _parts(caches: Any) -> list[Any]:
    """The caches that hold arrays, those in lists of caches among them."""
    return [part for cache in caches for part in (cache.caches if type(cache) is CacheList else (cache,))]
