"""Room for the next tokens of a cache, in whole steps.

mlx-lm's caches grow by a step of 256 tokens from wherever they end. One that was merged, taken out of a batch
or cut ends anywhere, and would hold up to a step more than plans count for it (planner/kv_profile.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache


def make_room(caches: Iterable[Any], num_tokens: int) -> None:
    """Before so many tokens come. Evaluates nothing, and leaves alone what mlx-lm grows to whole steps."""
    for cache in caches:
        if type(cache) is CacheList:
            make_room(cache.caches, num_tokens)
        elif type(cache) is KVCache:
            _grow(cache, cache.offset, num_tokens)
        elif type(cache) is BatchKVCache:
            _grow(cache, cache._idx, num_tokens)


def _grow(cache: Any, end: int, num_tokens: int) -> None:
    step = cache.step
    if cache.keys is None or end % step == 0 or end + num_tokens <= cache.keys.shape[2]:
        return
    size = -(-(end + num_tokens) // step) * step
    pad = [(0, 0), (0, 0), (0, size - end), (0, 0)]
    cache.keys, cache.values = (mx.pad(kept[..., :end, :], pad) for kept in (cache.keys, cache.values))
