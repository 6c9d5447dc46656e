"""A timeline as Chrome's trace events, which https://ui.perfetto.dev and chrome://tracing open. Pure.

Format: "Trace Event Format", Google, 2016. Times in us. A process of the file is a node, a thread is one kind
of work there. Where spans of one kind overlap, as frames that wait do, each has a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.trace_parts import Answer, Trip
from cluster.trace_recorder import MEMORY_FIELDS
from cluster.trace_spans import Frame, Part, Span, Timeline

REQUESTS_PID = 0
ROWS = (
    Part.HEAD,
    Part.WIRE,
    Part.RETURN,
    Part.IN,
    Part.QUEUE,
    Part.BUILD,
    Part.COMPUTE,
    Part.SAMPLE,
    Part.OUT,
    Part.CREDIT,
    Part.DRAFT,
    Part.LOAD,
)
MAX_LANES = 1000

Event = dict[str, Any]


def trace_file(
    timeline: Timeline, answer: Answer, names: Mapping[int, str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole file. names: of the nodes, by rank, with their layers."""
    queued = metadata.get("queued_ms", 0.0) / 1e3
    zero = min(
        [frame.fed - queued for frame in timeline.frames.values() if answer.session in frame.sessions]
        + [span.began for span in timeline.spans]
        + [frame.fed for frame in timeline.frames.values()]
        + [at for moments in timeline.memory.values() for at, _ in moments],
        default=0.0,
    )
    events: list[Event] = []
    if answer.trips or answer.unfinished:
        events += _requests(timeline, answer, names, queued, zero)
    for rank in sorted(names):
        events += _process(rank + 1, names[rank])
        own = [span for span in timeline.spans if span.rank == rank]
        for index, part in enumerate(ROWS):
            spans = [[span] for span in own if span.part is part]

            events += _row(rank + 1, index * MAX_LANES, part.value, spans, zero)
        events += _counters(rank + 1, timeline.memory.get(rank, ()), zero)
    events += _arrows(timeline, zero)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(metadata)}


def _process(pid: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}


def _row(
    pid: int, first_tid: int, name: str, groups: Sequence[Sequence[Span]], zero: float
) -> Iterator[Event]:
    """Groups of nested spans, the outermost first; those that overlap go to lines of their own."""
    lanes: list[float] = []  # until when each is taken
    for group in sorted(groups, key=lambda g: g[0].began):
        outer = group[0]
        lane = next((i for i, until in enumerate(lanes) if until <= outer.began), len(lanes))
        if lane == len(lanes):
            lanes.append(0.0)
            yield from _thread(pid, first_tid + lane, name if not lane else f"{name} {lane + 1}")
        lanes[lane] = outer.ended
        for span in group:
            yield _event(pid, first_tid + lane, span, zero)


def _thread(pid: int, tid: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _event(pid: int, tid: int, span: Span, zero: float) -> Event:
    args = dict(span.args) | ({"frame": span.seq} if span.seq else {})
    began_us, ended_us = _us(span.began, zero), _us(span.ended, zero)
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": span.name,
        "cat": span.part.value,
        "ts": began_us,
        "dur": round(ended_us - began_us, 3),
        "args": args,
    }


def _us(at: float, zero: float) -> float:
    return round((at - zero) * 1e6, 3)


# -- the request: a row of trips, with the stages and ways inside each --------------------------------------
def _requests(
    timeline: Timeline, answer: Answer, names: Mapping[int, str], queued: float, zero: float
) -> Iterator[Event]:
    """queued: s that it waited at the head before its first frame was fed."""
    yield from _process(REQUESTS_PID, "the traced request")
    groups = [_trip_spans(timeline, one, index, names) for index, one in enumerate(answer.trips, 2)]
    drawn = {one.frame.seq for one in answer.trips}
    frames = (f for f in timeline.frames.values() if answer.session in f.sessions and f.seq not in drawn)
    groups += [_other_spans(timeline, frame, answer.session, names) for frame in frames]
    if queued > 0:
        began, ended = answer.first_fed - queued, answer.first_fed
        groups.append([Span(timeline.head_rank, Part.QUEUE, "waits to be started", began, ended)])
    yield from _row(REQUESTS_PID, 0, "trips", groups, zero)


def _trip_spans(timeline: Timeline, trip: Trip, index: int, names: Mapping[int, str]) -> list[Span]:
    count = "" if trip.num_tokens == 1 else f" and {trip.num_tokens - 1} more"
    args = {part.value + " ms": round(s * 1e3, 4) for part, s in trip.parts.items()}
    frame = trip.frame
    outer = Span(
        timeline.head_rank, Part.OTHER, f"token {index}{count}", frame.fed, trip.ended, frame.seq, args
    )
    return [outer, *_inside(frame, outer, names)]


def _other_spans(
    timeline: Timeline, frame: Frame, session: int | None, names: Mapping[int, str]
) -> list[Span]:
    """Of the prompt, one whose tokens the answer has not, or one that never came back."""
    last = max([span.ended for span in frame.spans], default=frame.fed)
    if frame.returned is None:
        name, ended = "unfinished", max(last, frame.fed)
    else:
        name, ended = "prompt", frame.returned[1]
        if frame.is_sampled:
            name = "first token" if frame.drawn.get(session or 0) else "behind a wrong guess"
    outer = Span(
        timeline.head_rank, Part.OTHER, name, frame.fed, ended, frame.seq, {"tokens": frame.num_tokens}
    )
    return [outer, *_inside(frame, outer, names)]


def _inside(frame: Frame, outer: Span, names: Mapping[int, str]) -> Iterable[Span]:
    """What the trip consists of, one after another: nodes, ways between them, and the head."""
    run: list[Span] = []
    for span in sorted(frame.spans, key=lambda s: s.began):
        is_way = span.part in (Part.WIRE, Part.RETURN)
        if not is_way and (span.part is Part.HEAD or _is_return(span, frame)):
            continue
        if run and (is_way or span.rank != run[0].rank):
            yield _run(run, outer, names)
            run = []
        if is_way:
            yield Span(
                span.rank, span.part, span.part.value, span.began, min(span.ended, outer.ended), frame.seq
            )
        else:
            run.append(span)
    if run:
        yield _run(run, outer, names)
    if frame.returned is not None and frame.returned[0] < outer.ended:
        yield Span(outer.rank, Part.HEAD, "head", frame.returned[0], outer.ended, frame.seq)


def _run(run: Sequence[Span], outer: Span, names: Mapping[int, str]) -> Span:
    """What a node did with a frame at one go."""
    rank, ended = run[0].rank, max(span.ended for span in run)
    return Span(rank, Part.COMPUTE, names[rank], run[0].began, min(ended, outer.ended), outer.seq)


def _is_return(span: Span, frame: Frame) -> bool:
    """The decoding of a RESULT."""
    return span.part is Part.IN and any(
        way.part is Part.RETURN and way.rank == span.rank and way.ended <= span.began + 1e-9
        for way in frame.spans
    )


# -- what goes across rows ----------------------------------------------------------------------------------
def _arrows(timeline: Timeline, zero: float) -> Iterator[Event]:
    """From the sender's copy out to the receiver's copy in."""
    spans = timeline.spans
    decoded = {(s.rank, s.seq, s.args["from"]): s for s in spans if s.part is Part.IN}
    encoded = {(s.rank, s.seq, s.args["to"]): s for s in spans if s.name == "to messages"}
    out_tid, in_tid = ROWS.index(Part.OUT) * MAX_LANES, ROWS.index(Part.IN) * MAX_LANES
    for number, hop in enumerate(timeline.hops, 1):
        there = encoded.get((hop.from_rank, hop.seq, hop.to_rank))
        here = decoded.get((hop.to_rank, hop.seq, hop.from_rank))
        if there is None or here is None:
            continue
        flow = {"cat": "way", "name": "frame", "id": number}
        yield flow | {"ph": "s", "pid": hop.from_rank + 1, "tid": out_tid, "ts": _us(there.began, zero)}
        yield flow | {
            "ph": "f",
            "bp": "e",
            "pid": hop.to_rank + 1,
            "tid": in_tid,
            "ts": _us(here.began, zero),
        }


def _counters(pid: int, moments: Iterable[tuple[float, tuple[int, ...]]], zero: float) -> Iterator[Event]:
    """Bytes, where they were traced."""
    for at, numbers in moments:
        told = dict(zip(MEMORY_FIELDS, numbers, strict=False))
        base = {"ph": "C", "pid": pid, "ts": _us(at, zero)}
        other = max(0, told["active"] - told["weights"] - told["kv"])
        shown = {"weights": told["weights"], "kv": told["kv"], "other active": other, "cache": told["cache"]}
        yield base | {"name": "MLX bytes", "args": shown}
        yield base | {"name": "process bytes", "args": {"resident": told["rss"]}}
