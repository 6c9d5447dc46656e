"""What caches hold is what plans count for them (planner/kv_profile.py): room in whole steps, no scratch.

mlx-lm's caches grow by a step of 256 tokens from wherever they end. One that was merged, taken out of a batch
or cut ends anywhere, and would hold up to a step more. A recurrent state is often a slice of what was
computed for all tokens of a pass, and would hold all of that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
)


def grows_at(position: int) -> bool:
    """Whether caches of a sequence of so many tokens, read from its beginning, grow with the next one."""
    return bool(position % KVCache.step == 0)


def make_room(caches: Iterable[Any], num_tokens: int) -> None:
    """Before so many tokens come. Evaluates nothing, and leaves alone what mlx-lm grows to whole steps."""
    for cache in caches:
        if type(cache) is CacheList:
            make_room(cache.caches, num_tokens)
        elif type(cache) is KVCache:
            _grow(cache, cache.offset, num_tokens)
        elif type(cache) is BatchKVCache:
            _grow(cache, cache._idx, num_tokens)
        elif type(cache) is BatchRotatingKVCache and num_tokens > 1:
            # mlx-lm makes the mask of several tokens as for a window in order, and orders it afterwards.
            cache._temporal_order()


def let_go(caches: Iterable[Any]) -> None:
    """After a pass of several tokens: what it had beside the states it ended with. Evaluates nothing."""
    for cache in caches:
        if type(cache) is CacheList:
            let_go(cache.caches)
        elif type(cache) is ArraysCache:
            cache.cache = [None if entry is None else mx.contiguous(entry) for entry in cache.cache]


def _grow(cache: Any, end: int, num_tokens: int) -> None:
    step = cache.step
    if cache.keys is None or end % step == 0 or end + num_tokens <= cache.keys.shape[2]:
        return
    size = -(-(end + num_tokens) // step) * step
    pad = [(0, 0), (0, 0), (0, size - end), (0, 0)]
    cache.keys, cache.values = (mx.pad(kept[..., :end, :], pad) for kept in (cache.keys, cache.values))
