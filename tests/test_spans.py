from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shard_loader.spans import (
    GAP_SHARE,
    Span,
    coalesce,
    covers,
    intersect,
    pieces,
    subtract,
    total_bytes,
    union,
)

SPANS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: (min(s), max(s))), max_size=8
)


def members(spans: list[Span]) -> set[int]:
    return {i for start, stop in spans for i in range(start, stop)}


@given(SPANS, SPANS)
def test_spans_are_sets_of_bytes(a: list[Span], b: list[Span]) -> None:
    for found, wanted in (
        (union(a), members(a)),
        (subtract(a, b), members(a) - members(b)),
        (intersect(a, b), members(a) & members(b)),
    ):
        assert members(found) == wanted
        assert found == union(found)
    assert total_bytes(a) == len(members(a))


@given(SPANS, st.integers(0, 60), st.integers(0, 60))
def test_covers_is_membership(spans: list[Span], start: int, stop: int) -> None:
    assert covers(union(spans), start, stop) == (set(range(start, stop)) <= members(spans))


@given(SPANS, st.integers(1, 20))
def test_pieces_tile(spans: list[Span], max_bytes: int) -> None:
    cut = list(pieces(union(spans), max_bytes))
    assert union(cut) == union(spans)
    assert all(0 < stop - start <= max_bytes for start, stop in cut)
    assert sum(stop - start for start, stop in cut) == total_bytes(spans)


def test_only_small_gaps_are_fetched_along() -> None:
    assert coalesce([(0, 1000), (1004, 2000)]) == [(0, 2000)]
    assert coalesce([(0, 1000), (1020, 2000)]) == [(0, 1000), (1020, 2000)]  # 2 %
    far = [(0, 10**9), (10**9 + 10**6, 2 * 10**9)]
    assert coalesce(far) == far  # a share of 0.05 %, but a megabyte
    many = [(i * 100, i * 100 + 99) for i in range(1000)]
    gained = total_bytes(coalesce(many)) - total_bytes(many)
    assert 0 < gained <= total_bytes(many) // GAP_SHARE
