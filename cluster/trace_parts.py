"""Where the milliseconds of a request's tokens went: its trips round the ring, part by part. Pure.

A trip begins when the head feeds a frame of the request and ends when it feeds the next one: the trips of an
answer follow each other without a gap, unless guesses go ahead. Its parts add up to it: what no span covers
is `other`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from cluster.trace_spans import Frame, Part, Span, Timeline

SHOWN: tuple[Part, ...] = tuple(part for part in Part if part not in (Part.DRAFT, Part.LOAD))


@dataclass(frozen=True, slots=True)
class Trip:
    """One frame of the request. parts: s, all of SHOWN. by_rank: the same of each node's own work."""

    frame: Frame
    ended: float
    num_tokens: int  # drawn for this request
    parts: Mapping[Part, float]
    by_rank: Mapping[int, Mapping[Part, float]]

    @property
    def took(self) -> float:
        return self.ended - self.frame.fed


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one request. `trips`: those that drew a token after the first one; the table is of these."""

    session: int | None  # None: it never entered the ring
    first_fed: float
    first_token: float | None  # when the head had it
    trips: tuple[Trip, ...]
    unfinished: tuple[Frame, ...]  # fed, and never seen again


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    part: Part
    p50_ms: float
    mean_ms: float
    share: float


def answer_of(timeline: Timeline, request_id: str) -> Answer:
    """The trips of the request with this id."""
    session = next((s for s, name in timeline.requests.items() if name == request_id), None)
    frames = sorted((f for f in timeline.frames.values() if session in f.sessions), key=lambda f: f.fed)
    if session is None or not frames:
        return Answer(None, 0.0, None, (), ())
    trips, first_token = [], None
    for i, frame in enumerate(frames):
        num_tokens = frame.drawn.get(session, 0)
        if frame.returned is None or not num_tokens:
            continue
        if first_token is None:  # this trip was the prompt's
            first_token = frame.returned[0]
            continue
        following = frames[i + 1].fed if i + 1 < len(frames) else None
        ended = following if following is not None and following >= frame.returned[0] else frame.returned[1]
        trips.append(trip(frame, ended, num_tokens))
    unfinished = tuple(frame for frame in frames if frame.returned is None)
    return Answer(session, frames[0].fed, first_token, tuple(trips), unfinished)


def trip(frame: Frame, ended: float, num_tokens: int) -> Trip:
    """Each moment counts once: a span within another one is taken off it."""
    by_rank: dict[int, dict[Part, float]] = {}
    for rank in {span.rank for span in frame.spans}:
        own = by_rank[rank] = {}
        for part, took in _own_times(span for span in frame.spans if span.rank == rank and _is_way(span)):
            own[part] = own.get(part, 0.0) + took
    parts: dict[Part, float] = dict.fromkeys(SHOWN, 0.0)
    for own in by_rank.values():
        for part, took in own.items():
            parts[part] += took
    if frame.returned is not None:  # until the next frame is fed: not all of what the head does
        parts[Part.HEAD] = ended - frame.returned[0]
    parts[Part.OTHER] = ended - frame.fed - sum(parts.values())
    return Trip(frame, ended, num_tokens, parts, by_rank)


def _is_way(span: Span) -> bool:
    return span.part is not Part.HEAD and span.part in SHOWN


def _own_times(spans: Iterable[Span]) -> Iterable[tuple[Part, float]]:
    """The time of each span without that of those inside it."""
    stack: list[tuple[Span, float]] = []  # with the time of what is inside
    for span in sorted(spans, key=lambda s: (s.began, -s.ended)):
        while stack and stack[-1][0].ended <= span.began:
            yield _popped(stack)
        if stack:
            inside, so_far = stack[-1]
            stack[-1] = inside, so_far + min(span.ended, inside.ended) - span.began
        stack.append((span, 0.0))
    while stack:
        yield _popped(stack)


def _popped(stack: list[tuple[Span, float]]) -> tuple[Part, float]:
    span, inside = stack.pop()
    return span.part, span.took - inside


def table(trips: Sequence[Trip]) -> list[Row]:
    """A row for each part. The means add up to the mean trip, the shares to 1; empty without trips."""
    if not trips:
        return []
    whole = sum(one.took for one in trips)
    rows = []
    for part in SHOWN:
        took = [one.parts[part] for one in trips]
        rows.append(Row(part, median(took) * 1e3, mean(took) * 1e3, sum(took) / whole))
    return rows


def stage_means_ms(trips: Sequence[Trip], rank: int) -> dict[str, float]:
    """The mean of each part of one node's own work, in ms; the wire's is of its way there."""
    parts = {part for one in trips for part in one.by_rank.get(rank, {})}
    return {
        part.value: mean(one.by_rank.get(rank, {}).get(part, 0.0) for one in trips) * 1e3
        for part in SHOWN
        if part in parts
    }
