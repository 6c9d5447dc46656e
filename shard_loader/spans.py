"""Half-open byte ranges [start, stop) and what is left of them. Pure arithmetic; every result is sorted and
disjoint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Span = tuple[int, int]

MAX_GAP_BYTES = 256 * 1024  # a gap of more than this is cheaper to ask around than to fetch
GAP_SHARE = 200  # all gaps together cost at most a 200th of what is wanted


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans, sorted, with those that touch made one; empty ones vanish."""
    merged: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """What of `spans` is not in `taken`."""
    holes = union(taken)
    left: list[Span] = []
    at = 0
    for start, stop in union(spans):
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        begin, index = start, at
        while index < len(holes) and holes[index][0] < stop:
            if begin < holes[index][0]:
                left.append((begin, holes[index][0]))
            begin = holes[index][1]
            index += 1
        if begin < stop:
            left.append((begin, stop))
    return left


def intersect(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """What is in both."""
    mine = union(spans)
    return subtract(mine, subtract(mine, others))


def covers(spans: Sequence[Span], start: int, stop: int) -> bool:
    """Whether [start, stop) lies within one of the sorted, disjoint `spans`; nothing lies anywhere."""
    at = bisect_right(spans, start, key=lambda span: span[0]) - 1
    return start >= stop or (at >= 0 and stop <= spans[at][1])


def total_bytes(spans: Iterable[Span]) -> int:
    """The bytes in the spans; overlaps count once."""
    return sum(stop - start for start, stop in union(spans))


def coalesce(spans: Iterable[Span]) -> list[Span]:
    """The spans with their smallest gaps filled, so that fewer requests are needed.

    No gap of more than MAX_GAP_BYTES is filled, and all filled ones together are at most a 200th of the
    spans' own bytes.
    """
    own = union(spans)
    allowance_bytes = total_bytes(own) // GAP_SHARE
    filled = list(own)
    for start, stop in sorted(_gaps(own), key=lambda gap: gap[1] - gap[0]):
        size = stop - start
        if size > min(MAX_GAP_BYTES, allowance_bytes):
            break
        allowance_bytes -= size
        filled.append((start, stop))
    return union(filled)


def pieces(spans: Iterable[Span], max_bytes: int) -> Iterator[Span]:
    """The spans cut into pieces of at most `max_bytes`."""
    for start, stop in spans:
        for begin in range(start, stop, max_bytes):
            yield begin, min(begin + max_bytes, stop)


def _gaps(spans: list[Span]) -> list[Span]:
    return [(left[1], right[0]) for left, right in pairwise(spans)]
