"""What can be done with mlx-lm's caches: merged into a batch and taken apart again, copied and shortened.

A copy shares its arrays with the original until one of them is written.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from planner.kv_profile import in_whole_steps
from shard_loader.kv_rows import KVRows


def is_mergeable(cache: Any) -> bool:
    """Whether mlx-lm has a batched form of this cache that gives the same numbers."""
    if type(cache) is CacheList:
        return all(is_mergeable(part) for part in cache.caches)
    if type(cache) is RotatingKVCache:
        return not cache.keep  # the batched form forgets which tokens to keep
    return type(cache) in (KVCache, ArraysCache)


def merged_shadow(cache: Any, num_rows: int) -> Any:
    """A foreign cache of which only the offset is ever read, for so many rows."""
    return merged([cache] * num_rows, KVRows()) if is_mergeable(cache) else cache


def merged(caches: list[Any], kv: KVRows) -> Any:
    """One cache with a row for each, left-padded to the longest; evaluates nothing. kv: of the state made."""
    first = caches[0]
    if type(first) is CacheList:
        return CacheList(*(merged([c.caches[i] for c in caches], kv) for i in range(len(first.caches))))
    if type(first) is ArraysCache:
        return _merge_arrays(caches)
    return kv.merge(caches) if type(first) is KVCache else first.merge(caches)


def extend(cache: Any, other: Any, kv: KVRows, others: KVRows, num_rows: tuple[int, int]) -> None:
    """The rows of `other`, which is used up, come behind those of `cache`; num_rows: of each."""
    if type(cache) is CacheList:
        for part, more in zip(cache.caches, other.caches, strict=True):
            extend(part, more, kv, others, num_rows)
    elif type(cache) is BatchKVCache:
        kv.extend(cache, other, others)
    elif type(cache) is ArraysCache:
        _extend_arrays(cache, other, num_rows)
    else:
        cache.extend(other)


def keep(cache: Any, rows: Sequence[int], kv: KVRows) -> None:
    """Only these rows, in this order."""
    if type(cache) is CacheList:
        for part in cache.caches:
            keep(part, rows, kv)
    elif type(cache) is BatchKVCache:
        kv.keep(cache, rows)
    else:
        cache.filter(kv.numbers(rows))


def taken(cache: Any, rows: Sequence[int], kv: KVRows, source: KVRows) -> Any:
    """A cache with these rows of one that keeps them too; kv: of the state that gets it."""
    if type(cache) is CacheList:
        return CacheList(*(taken(part, rows, kv, source) for part in cache.caches))
    if type(cache) is BatchKVCache:
        return kv.taken(cache, rows, source)
    twin = copy.copy(cache)
    for name, value in vars(cache).items():
        setattr(twin, name, handles(value))
    twin.filter(kv.numbers(rows))
    return twin


def _merge_arrays(caches: list[ArraysCache]) -> ArraysCache:
    """As ArraysCache.merge, which stumbles over an entry that no row has filled."""
    merged = ArraysCache(len(caches[0].cache))
    for entry in range(len(merged.cache)):
        rows = [cache.cache[entry] for cache in caches]
        known = next((row for row in rows if row is not None), None)
        if known is not None:
            merged.cache[entry] = mx.concatenate(
                [mx.zeros_like(known) if row is None else row for row in rows], axis=0
            )
    return merged


def _extend_arrays(cache: ArraysCache, other: ArraysCache, num_rows: tuple[int, int]) -> None:
    """As ArraysCache.extend, which takes rows that have read nothing for a single one."""
    for entry, parts in enumerate(zip(cache.cache, other.cache, strict=True)):
        known = next((part for part in parts if part is not None), None)
        if known is not None:
            filled = [
                mx.zeros((num, *known.shape[1:]), known.dtype) if part is None else part
                for part, num in zip(parts, num_rows, strict=True)
            ]
            cache.cache[entry] = mx.concatenate(filled)


def extracted(cache: Any, row: int, kv: KVRows) -> Any:
    """The cache of one row alone."""
    if type(cache) is CacheList:
        return CacheList(*(extracted(part, row, kv) for part in cache.caches))
    if type(cache) is BatchKVCache:
        return kv.extract(cache, row)
    if type(cache) is ArraysCache:
        alone = ArraysCache(len(cache.cache))
        # Contiguous: a slice would keep the memory of all rows.
        alone.cache = [
            None if entry is None else mx.contiguous(entry[row : row + 1]) for entry in cache.cache
        ]
        return alone
    return cache.extract(row)


def trim_window(cache: Any) -> int | None:
    """A copy may begin with any of the tokens while the cache holds fewer than this; None: it has no copy."""
    if type(cache) is CacheList:
        windows = [trim_window(part) for part in cache.caches]
        known = [window for window in windows if window is not None]
        return min(known, default=None) if len(known) == len(windows) else None
    if type(cache) is RotatingKVCache:
        return int(cache.max_size)
    if type(cache) in (KVCache, QuantizedKVCache):
        return sys.maxsize
    return 0 if type(cache) is ArraysCache else None


def forked(cache: Any, num_dropped: int) -> Any:
    """A copy without the last `num_dropped` tokens; only where `trim_window` allows it."""
    if type(cache) is CacheList:
        return CacheList(*(forked(part, num_dropped) for part in cache.caches))
    twin = copy.copy(cache)
    for name, value in vars(cache).items():
        setattr(twin, name, handles(value))
    if num_dropped:
        twin.trim(num_dropped)
        room = in_whole_steps(twin.offset)
        twin.keys, twin.values = _shortened(twin.keys, room), _shortened(twin.values, room)
    return twin


def _shortened(value: Any, room: int) -> Any:
    """Keys or values (..., T, D) of so many tokens: a copy that is written must not get the source's size."""
    if isinstance(value, mx.array):
        return value[..., :room, :] if value.shape[-2] > room else value
    if value is None:  # of a layer without attention
        return None
    return type(value)(_shortened(item, room) for item in value)


def handles(value: Any) -> Any:
    """Arrays of their own on the same memory: writing to one leaves the other as it was."""
    if isinstance(value, mx.array):
        return mx.stop_gradient(value)
    if isinstance(value, (list, tuple)):
        return type(value)(handles(item) for item in value)
    if isinstance(value, dict):
        return {key: handles(item) for key, item in value.items()}
    return value
