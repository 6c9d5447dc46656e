"""How a sequence's caches go back to an earlier token, for tokens that were only guessed.

- Caches that keep every token forget the last ones (`trim` of mlx-lm).
- A window that has wrapped has lost what a single token overwrote. But a pass of several tokens appends them
  all behind what the first of them still sees, so that right after it any of them but the first can go.
- A recurrent state keeps no tokens: it goes back to what it was before the pass, of which a mark was made.
  The tokens of that pass that were right are then read again.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from shard_loader.merging import forked
from shard_loader.reach import Reach


def reach(cache: Any) -> Reach:
    """Of one of the caches that a model makes."""
    if type(cache) is CacheList:
        return min(map(reach, cache.caches), default=Reach.ANY)
    if type(cache) in (KVCache, QuantizedKVCache):
        return Reach.ANY
    if type(cache) is RotatingKVCache:
        return Reach.PASS
    return Reach.MARK if type(cache) is ArraysCache else Reach.NONE


class Mark:
    """What caches were before a pass, but for those that can forget its tokens one by one.

    It holds what the pass replaces, as long as it is held itself. position: tokens seen before the pass.
    """

    def __init__(self, own: dict[int, Any], position: int) -> None:
        self.position = position
        self._saved = {i: forked(cache, 0) for i, cache in own.items() if reach(cache) < Reach.ANY}

    def restore(self, own: dict[int, Any], num_tokens: int) -> None:
        """The caches become what they were, `num_tokens` ago; the mark is used up."""
        for i, cache in own.items():
            saved = self._saved.get(i)
            if saved is None:
                forget(cache, num_tokens)
                continue
            for name, value in vars(saved).items():
                setattr(cache, name, value)


def forget(cache: Any, num_tokens: int) -> None:
    """The last tokens go; only where `reach` allows it. Evaluates nothing.

    Raises ValueError where the cache has lost what came before them.
    """
    if type(cache) is CacheList:
        for part in cache.caches:
            forget(part, num_tokens)
    elif cache.empty():
        return  # of a layer that keeps nothing
    elif type(cache) is RotatingKVCache and not cache.is_trimmable():
        _shorten(cache, num_tokens)
    elif reach(cache) == Reach.MARK or cache.trim(num_tokens) != num_tokens:
        raise ValueError(f"a {type(cache).__name__} cannot forget {num_tokens} tokens")


def _shorten(cache: Any, num_tokens: int) -> None:
    """A window that has wrapped, whose last pass appended several tokens."""
    length = cache.keys.shape[2] - num_tokens
    if cache._idx != cache.keys.shape[2] or length < min(cache.offset - num_tokens, cache.max_size):
        raise ValueError(
            f"a window of {cache.max_size} tokens has lost what came before the last {num_tokens}"
        )
    cache.keys, cache.values = cache.keys[..., :length, :], cache.values[..., :length, :]
    cache.offset -= num_tokens
    cache._idx = length
