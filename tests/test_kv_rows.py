"""Rows of key-value caches, held against mlx-lm's own way through random changes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from shard_loader.kv_rows import KVRows

LAYERS, HEADS, SIZE = 3, 2, 4


def told(cache: KVCache | BatchKVCache, num_rows: int, num_tokens: int) -> None:
    """So many more tokens of each row."""
    shape = (num_rows, HEADS, num_tokens, SIZE)
    cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))


def lone(num_tokens: int) -> list[KVCache]:
    """One sequence's caches of all layers."""
    caches = [KVCache() for _ in range(LAYERS)]
    for cache in caches:
        if num_tokens:
            told(cache, 1, num_tokens)
    return caches


class Both:
    """The same rows twice."""

    def __init__(self, rows: Sequence[Sequence[KVCache]]) -> None:
        columns = [list(column) for column in zip(*rows, strict=True)]
        self.kv = KVRows()
        self.ours = [self.kv.merge(column) for column in columns]
        self.theirs = [BatchKVCache.merge(column) for column in columns]
        self.num_rows = len(rows)
        self.kv.changed()

    def extend(self, other: Both) -> None:
        for a, b, c, d in zip(self.ours, other.ours, self.theirs, other.theirs, strict=True):
            self.kv.extend(a, b, other.kv)
            c.extend(d)
        self.num_rows += other.num_rows
        self.kv.changed()

    def keep(self, rows: list[int]) -> None:
        for a, b in zip(self.ours, self.theirs, strict=True):
            self.kv.keep(a, rows)
            b.filter(rows)
        self.num_rows = len(rows)
        self.kv.changed()

    def step(self) -> None:
        for a, b in zip(self.ours, self.theirs, strict=True):
            shape = (self.num_rows, HEADS, 1, SIZE)
            keys, values = mx.random.normal(shape), mx.random.normal(shape)
            for mine, other in zip(
                a.update_and_fetch(keys, values), b.update_and_fetch(keys, values), strict=True
            ):
                assert mine.shape == other.shape
        self.kv.share_offsets()

    def compare(self) -> None:
        for a, b in zip(self.ours, self.theirs, strict=True):
            assert a._idx == b._idx
            assert a.offset.tolist() == b.offset.tolist()
            assert a.left_padding.tolist() == b.left_padding.tolist()
            assert a.offset is self.ours[0].offset
            assert a.left_padding is self.ours[0].left_padding
            for row, padding in enumerate(a.left_padding.tolist()):
                for mine, other in ((a.keys, b.keys), (a.values, b.values)):
                    if other is not None and padding < a._idx:
                        span = (row, slice(None), slice(padding, a._idx))
                        assert mx.array_equal(mine[span], other[span])
                single, reference = self.kv.extract(a, row), b.extract(row) if b.keys is not None else None
                assert single.offset == a._idx - padding
                if reference is not None and single.offset:
                    assert mx.array_equal(single.keys, reference.keys)
                    assert mx.array_equal(single.values, reference.values)
            state = a.keys_and_values() if a.keys is not None else ()
            assert all(not mx.isnan(array).any() for array in state)


@pytest.mark.parametrize("seed", range(12))
def test_what_becomes_of_rows_is_what_mlx_lm_makes_of_them(seed: int) -> None:
    choose = random.Random(seed)
    mx.random.seed(seed)

    def some() -> Both:
        lengths = [choose.choice((1, 3, 255, 256, 257, 300)) for _ in range(choose.randint(1, 3))]
        return Both([lone(length) for length in lengths])

    rows = some()
    for _ in range(12):
        what = choose.randrange(4)
        if what == 0 and rows.num_rows < 8:
            rows.extend(some())
        elif what == 1 and rows.num_rows > 1:
            rows.keep(choose.sample(range(rows.num_rows), choose.randint(1, rows.num_rows)))
        else:
            rows.step()
        rows.compare()


def test_rows_that_are_taken_stay_where_they_were() -> None:
    rows = Both([lone(5), lone(9), lone(2)])
    before = [mx.array(cache.keys) for cache in rows.ours]
    other = KVRows()
    taken = [other.taken(cache, [2, 0], rows.kv) for cache in rows.ours]
    rows.compare()
    for cache, reference in zip(taken, rows.theirs, strict=True):
        reference.filter([2, 0])
        assert (cache._idx, cache.left_padding.tolist()) == (5, [3, 0])
        assert mx.array_equal(cache.keys[..., :5, :], reference.keys[..., :5, :])
        told(cache, 2, 1)
    for kept, cache in zip(before, rows.ours, strict=True):
        assert mx.array_equal(kept, cache.keys)


def test_a_layer_without_tokens_joins_too() -> None:
    rows = Both([lone(0), lone(0)])
    other = Both([lone(4)])
    rows.extend(other)
    assert rows.ours[0].left_padding.tolist() == [4, 4, 0]
    assert rows.ours[0].offset.tolist() == [0, 0, 4]
    rows.step()
    rows.compare()


def test_a_pass_counts_once_for_all_layers() -> None:
    """mlx-lm adds to each layer's array of offsets; on a GPU each of these is a launch."""
    rows = Both([lone(5), lone(9)])
    before = rows.ours[0].offset
    rows.step()
    assert rows.ours[0].offset is not before
    assert before.tolist() == [5, 9]  # mlx-lm does not write into an array that layers share
    assert len({id(cache.offset) for cache in rows.ours}) == 1
