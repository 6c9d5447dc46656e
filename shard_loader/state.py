"""One sequence's state on one stage. Compute thread only, but any thread may ask for `nbytes`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from planner.kv_quant import KvQuantization
from shard_loader.growing import let_go, make_room
from shard_loader.layout import Layout
from shard_loader.merging import forked, is_mergeable, merged_shadow, trim_window
from shard_loader.reach import Reach
from shard_loader.rewinding import Mark, forget, reach


class ShardState:
    """A sequence's caches on one stage, and how many tokens they have seen.

    own: {index in the model's cache list: cache}. A state whose forward pass raised is spoilt: drop it.
    kv: keys and values are kept in so many bits once the first chunk has been read, as mlx-lm keeps them with
    quantized_kv_start=0.
    """

    __slots__ = ("_kv", "_mark", "own", "position", "shadows", "view")

    def __init__(
        self, own: dict[int, Any], view: list[Any], shadows: list[Any], kv: KvQuantization | None = None
    ) -> None:
        self.own = own
        self._kv = kv  # None from the moment it is done
        self._mark: Mark | None = None
        self.position = 0
        self.view = view  # what the model is given: full length, foreign entries stand for own ones
        self.shadows = shadows  # parts of foreign caches of no own kind: only their offset is ever read

    def begin(self, num_tokens: int) -> None:
        """A forward pass of so many tokens is about to be built."""
        make_room(self.own.values(), num_tokens)
        for part in self.shadows:
            part.offset = self.position

    def advance(self, num_tokens: int) -> None:
        """The forward pass of `num_tokens` more tokens is built."""
        self.position += num_tokens
        if num_tokens > 1:
            let_go(self.own.values())
        kv, self._kv = self._kv, None
        if kv is not None:
            for i, cache in self.own.items():
                if type(cache) is KVCache:
                    packed = cache.to_quantized(group_size=kv.group_size, bits=kv.bits)
                    self.own[i] = packed
                    self.view = [packed if entry is cache else entry for entry in self.view]

    def mark(self) -> None:
        """The next pass is of tokens that are only guessed: `rewind` may go back to here."""
        self._mark = Mark(self.own, self.position)

    def rewind(self, position: int) -> None:
        """Forget the last tokens, down to `position`, as far as `Shard.reach` allows. Evaluates nothing.

        Raises ValueError where the caches cannot go there.
        """
        mark, self._mark = self._mark, None
        num_tokens = self.position - position
        if mark is not None and mark.position == position:
            mark.restore(self.own, num_tokens)
        else:
            for cache in self.own.values():
                forget(cache, num_tokens)
        self.position = position

    def take_over(self, source: ShardState, num_tokens: int) -> None:
        """A fresh state becomes a copy of another, with its first `num_tokens` tokens."""
        for i, cache in source.own.items():
            twin = forked(cache, source.position - num_tokens)
            self.view = [twin if entry is self.own[i] else entry for entry in self.view]
            self.own[i] = twin
        self.position = num_tokens
        if num_tokens:
            self._kv = None

    def arrays(self) -> list[mx.array]:
        """Every array of the own caches, for mx.eval."""
        return list(cache_arrays(self.own))

    @property
    def nbytes(self) -> int:
        """Bytes the own caches hold."""
        return sum(array.nbytes for array in cache_arrays(self.own))


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Which caches of the model's list a stage owns, and which own cache stands in for each foreign one.

    A foreign cache of the same kind as an own one would have the same offset and mask, so the own one takes
    its place. A foreign cache of no own kind stays as an empty shadow whose offset is kept right.
    """

    own: tuple[int, ...]
    stand_in: tuple[int | None, ...]  # per cache of the model; None: itself
    kv: KvQuantization | None = None

    @classmethod
    def of(cls, layout: Layout, start: int, stop: int) -> CachePlan:
        """For layers [start, stop): the caches they receive or read, and those that no layer receives."""
        needed = layout.sharing.needed_by(start, stop)
        own = sorted(layout.unreceived.union(needed, *layout.received[start:stop]))
        by_kind = {layout.cache_kinds[i]: i for i in reversed(own)}
        stand_in = (None if i in own else by_kind.get(kind) for i, kind in enumerate(layout.cache_kinds))
        return cls(tuple(own), tuple(stand_in))

    def new_state(self, model: nn.Module) -> ShardState:
        """Empty caches of a sequence that has seen no token."""
        fresh = make_prompt_cache(model)
        own = {i: fresh[i] for i in self.own}
        view = [fresh[i if same is None else same] for i, same in enumerate(self.stand_in)]
        alone = (fresh[i] for i, same in enumerate(self.stand_in) if same is None and i not in own)
        return ShardState(own, view, [part for cache in alone for part in _with_offset(cache)], self.kv)

    def trim_window(self, model: nn.Module) -> int | None:
        """See `Shard.trim_window`."""
        fresh = make_prompt_cache(model)
        windows = [trim_window(fresh[i]) for i in self.own]
        known = [window for window in windows if window is not None]
        return min(known, default=None) if len(known) == len(windows) else None

    def reach(self, model: nn.Module) -> Reach:
        """See `Shard.reach`."""
        fresh = make_prompt_cache(model)
        return min((reach(fresh[i]) for i in self.own), default=Reach.ANY)

    def is_mergeable(self, model: nn.Module) -> bool:
        """Whether states of several sequences can be merged: every own cache has a batched form."""
        fresh = make_prompt_cache(model)
        return self.kv is None and bool(self.own) and all(is_mergeable(fresh[i]) for i in self.own)

    def batch_view(self, model: nn.Module, own: dict[int, Any], num_rows: int) -> tuple[list[Any], list[Any]]:
        """What the model is given for so many rows, and the shadows in it whose offset must be set."""
        fresh = make_prompt_cache(model)
        view: list[Any] = []
        shadows: list[Any] = []
        for i, same in enumerate(self.stand_in):
            stands = i if i in own else same
            if stands is not None:
                view.append(own[stands])
                continue
            view.append(merged_shadow(fresh[i], num_rows))
            shadows += _with_offset(view[-1])
        return view, shadows


def unquantizable(model: nn.Module) -> str:
    """The kind of cache for which `model` cannot have quantised keys and values; empty where it can.

    KVCache has a quantised form that attention reads; states that do not grow stay as they are.
    """
    caches = make_prompt_cache(model)
    others = [cache for cache in caches if type(cache) not in (KVCache, ArraysCache)]
    if not others and not any(type(cache) is KVCache for cache in caches):
        others = caches[:1]
    return type(others[0]).__name__ if others else ""


def cache_arrays(value: Any) -> Iterator[mx.array]:
    """Every array that a cache, or a dict or list of caches, holds."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from cache_arrays(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from cache_arrays(item)
    elif hasattr(value, "__dict__"):
        yield from cache_arrays(value.__dict__)


def _with_offset(cache: Any) -> Iterator[Any]:
    """The parts of a cache that count tokens in an `offset`."""
    for part in getattr(cache, "caches", None) or (cache,):
        if isinstance(getattr(part, "offset", None), (int, mx.array)):
            yield part
