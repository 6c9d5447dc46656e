"""The rows of key-value caches that share a forward pass: merged, added, let go, taken out.

mlx-lm's BatchKVCache does this layer by layer, makes the small arrays of offsets and paddings anew for each,
and reads them back from the device. Here the layers of a state whose rows are alike share them, and what they
hold is known without asking it. The numbers are the same, and so is all else that a forward pass sees.
Compute thread only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from planner.kv_profile import in_whole_steps


class KVRows:
    """Of all BatchKVCaches of one state; each is changed in place."""

    def __init__(self) -> None:
        self._paddings: dict[int, tuple[int, ...]] = {}  # by id of a cache: places before each row's tokens
        self._caches: list[BatchKVCache] = []
        self._numbers: dict[tuple[int, ...], mx.array] = {}
        self._blank = BatchKVCache([0])

    def merge(self, caches: Sequence[KVCache]) -> BatchKVCache:
        """One row for each, which are used up."""
        lengths = [cache.size() for cache in caches]
        end = max(lengths)
        batch = copy.copy(self._blank)
        if len(caches) == 1:
            batch.keys, batch.values = caches[0].keys, caches[0].values
        elif end:
            known = [(row, cache) for row, cache in enumerate(caches) if cache.keys is not None]
            spans = [(row, row + 1, end - lengths[row], end) for row, _ in known]
            for name in ("keys", "values"):
                rows = [getattr(cache, name)[..., : cache.offset, :] for _, cache in known]
                setattr(batch, name, _placed(rows, spans, len(caches), end))
        self._caches.append(batch)
        self._set(batch, [end - length for length in lengths], end)
        return batch

    def extend(self, cache: BatchKVCache, other: BatchKVCache, others: KVRows) -> None:
        """The other's rows come behind those of `cache`."""
        mine, theirs = self._paddings[id(cache)], others._paddings[id(other)]
        end = max(cache._idx, other._idx)
        num_rows = len(mine) + len(theirs)
        known = [
            (part, first)
            for part, first in ((cache, 0), (other, len(mine)))
            if part.keys is not None and part._idx
        ]
        spans = [(first, first + part.keys.shape[0], end - part._idx, end) for part, first in known]
        made = {}
        for name in ("keys", "values"):
            rows = [getattr(part, name)[..., : part._idx, :] for part, _ in known]
            made[name] = _placed(rows, spans, num_rows, end) if rows else None
        cache.keys, cache.values = made["keys"], made["values"]
        padding = [
            *(number + end - cache._idx for number in mine),
            *(number + end - other._idx for number in theirs),
        ]
        self._set(cache, padding, end)

    def keep(self, cache: BatchKVCache, rows: Sequence[int]) -> None:
        """Only these rows, in this order, with the room that the longest of them needs."""
        padding = [self._paddings[id(cache)][row] for row in rows]
        spare = min(padding)
        if cache.keys is not None:
            index = self.numbers(rows)
            span = slice(spare, spare + in_whole_steps(cache._idx - spare))
            cache.keys, cache.values = (kept[..., span, :][index] for kept in (cache.keys, cache.values))
        self._set(cache, [number - spare for number in padding], cache._idx - spare)

    def taken(self, cache: BatchKVCache, rows: Sequence[int], source: KVRows) -> BatchKVCache:
        """These rows of a cache of `source`, which keeps them too."""
        twin = copy.copy(cache)
        self._caches.append(twin)
        self._paddings[id(twin)] = source._paddings[id(cache)]
        self.keep(twin, rows)
        return twin

    def extract(self, cache: BatchKVCache, row: int) -> KVCache:
        """One row alone; it stays in the batch too."""
        first, end = self._paddings[id(cache)][row], cache._idx
        alone = KVCache()
        if cache.keys is not None and first < end:
            alone.keys = mx.contiguous(cache.keys[row : row + 1, :, first:end])
            alone.values = mx.contiguous(cache.values[row : row + 1, :, first:end])
            alone.offset = end - first
        return alone

    def numbers(self, numbers: Sequence[int]) -> mx.array:
        """One for each row, (B,) int32; made once for all layers until the change is done."""
        key = tuple(numbers)
        if key not in self._numbers:
            self._numbers[key] = mx.array(key, dtype=mx.int32)
        return self._numbers[key]

    def changed(self) -> None:
        """A change of all caches is done: the arrays made for it are let go."""
        self._numbers.clear()

    def share_offsets(self) -> None:
        """After a forward pass: layers whose rows are alike count on with one array."""
        first: dict[tuple[int, tuple[int, ...]], Any] = {}
        for cache in self._caches:
            alike = first.setdefault((cache._idx, self._paddings[id(cache)]), cache)
            cache.offset, cache.left_padding = alike.offset, alike.left_padding

    def _set(self, cache: BatchKVCache, padding: Sequence[int], end: int) -> None:
        self._paddings[id(cache)] = tuple(padding)
        cache._idx = end
        cache.left_padding = self.numbers(padding)
        cache.offset = self.numbers([end - number for number in padding])


def _placed(
    rows: Sequence[mx.array], spans: Sequence[tuple[int, int, int, int]], num_rows: int, end: int
) -> mx.array:
    """An array (num_rows, heads, tokens, size) of zeros but for these, with room for one token more.

    spans: of each its first and last row, and its first and last token.
    """
    _, heads, _, size = rows[0].shape
    room = in_whole_steps(end + 1)
    placed = mx.zeros((num_rows, heads, room, size), rows[0].dtype)
    for part, (first_row, stop_row, first, stop) in zip(rows, spans, strict=True):
        placed[first_row:stop_row, :, first:stop] = part
    return placed
