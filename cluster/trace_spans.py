"""From what nodes recorded to spans on one line of time, and which of them belong to which frame. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cluster.trace_client import NodeTrace
from cluster.trace_clock import Clock, aligned
from cluster.trace_recorder import Kind, Record
from proto import ring_pb2


class Part(StrEnum):
    """Where the time of a frame's trip round the ring goes; the value is its row of the picture."""

    QUEUE = "queue"
    BUILD = "graph building"
    COMPUTE = "compute"
    SAMPLE = "sampling"
    OUT = "copy out"
    CREDIT = "waiting for credit"
    WIRE = "wire"
    IN = "copy in"
    RETURN = "return to the head"
    HEAD = "head"
    DRAFT = "drafting"  # beside the trips, as the next
    LOAD = "loading"
    OTHER = "other"


_PARTS = {
    Kind.RETURNED: (Part.HEAD, "result"),
    Kind.ENCODED: (Part.OUT, "to messages"),
    Kind.SENT: (Part.CREDIT, "waits for credit"),
    Kind.ARRIVED: (Part.IN, "decode"),
    Kind.BUILT: (Part.BUILD, "build"),
    Kind.COPIED_OUT: (Part.OUT, "to bytes"),
    Kind.SAMPLED: (Part.SAMPLE, "sample"),
    Kind.AHEAD: (Part.BUILD, "build ahead"),
    Kind.DRAFTED: (Part.DRAFT, "draft"),
    Kind.LOADED: (Part.LOAD, "load"),
}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time. Times in s of one clock; seq 0: of no frame."""

    rank: int
    part: Part
    name: str
    began: float
    ended: float
    seq: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def took(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Hop:
    """A frame's way between two nodes, from being handed to gRPC to being there as a whole."""

    seq: int
    from_rank: int
    to_rank: int
    sent: float
    arrived: float
    nbytes: int
    is_result: bool


@dataclass(slots=True)
class Frame:
    """A frame that the head fed. returned: when its RESULT was there and when that was dealt with."""

    seq: int
    fed: float
    num_tokens: int
    is_sampled: bool
    sessions: tuple[int, ...]
    returned: tuple[float, float] | None = None
    drawn: Mapping[int, int] = field(default_factory=dict)  # session -> tokens that its answer has
    spans: list[Span] = field(default_factory=list)


@dataclass(slots=True)
class Timeline:
    """All of it. `spans` has no zero-length ones and no negative ones."""

    head_rank: int
    clocks: Mapping[int, Clock]
    spans: list[Span]
    hops: list[Hop]
    frames: dict[int, Frame]
    requests: Mapping[int, str]  # session -> the request's id
    memory: Mapping[int, list[tuple[float, tuple[int, ...]]]]


def timeline(nodes: Sequence[NodeTrace], head_rank: int = 0) -> Timeline:
    """Of nodes whose clocks are known; others are left out."""
    known = {node.rank: node for node in nodes if node.clock is not None}
    clocks = {rank: node.clock for rank, node in known.items() if node.clock is not None}
    ends = {rank: node.records[-1].ended for rank, node in known.items() if node.records}
    ways: dict[tuple[int, int], float] = {}
    for hop in _hops({rank: _ours(node.records, clocks[rank]) for rank, node in known.items()}):
        pair = hop.from_rank, hop.to_rank
        ways[pair] = min(ways.get(pair, float("inf")), hop.arrived - hop.sent)
    clocks = aligned(clocks, ends, ways)
    records = {rank: _ours(node.records, clocks[rank]) for rank, node in known.items()}
    hops = _hops(records)
    frames, requests = _frames(records.get(head_rank, ()))
    spans = [span for rank, own in records.items() for span in _spans(rank, own, frames, head_rank)]
    spans += map(_wire, hops)
    for span in spans:
        if (frame := frames.get(span.seq)) is not None:
            frame.spans.append(span)
    memory = {
        rank: [(r.began, tuple(r.numbers)) for r in own if r.kind is Kind.MEMORY]
        for rank, own in records.items()
    }
    return Timeline(head_rank, clocks, spans, hops, frames, requests, memory)


def _ours(records: Iterable[Record], clock: Clock) -> list[Record]:
    return [r._replace(began=clock.ours(r.began), ended=clock.ours(r.ended)) for r in records]


def _hops(records: Mapping[int, Sequence[Record]]) -> list[Hop]:
    """Pairs of what was sent and what arrived."""
    sent = {
        (r.seq, rank, r.peer, r.numbers[1]): r
        for rank, own in records.items()
        for r in own
        if r.kind is Kind.SENT
    }
    hops = []
    for rank, own in records.items():
        for r in own:
            if r.kind is Kind.ARRIVED and (there := sent.get((r.seq, r.peer, rank, r.numbers[1]))):
                is_result = r.numbers[1] == ring_pb2.RESULT
                hops.append(Hop(r.seq, r.peer, rank, there.ended, r.began, r.numbers[0], is_result))
    return hops


def _wire(hop: Hop) -> Span:
    part = Part.RETURN if hop.is_result else Part.WIRE
    ended = max(hop.sent, hop.arrived)
    args = {"bytes": hop.nbytes, "from": hop.from_rank, "to": hop.to_rank}
    return Span(hop.to_rank, part, f"from rank {hop.from_rank}", hop.sent, ended, hop.seq, args)


def _frames(records: Iterable[Record]) -> tuple[dict[int, Frame], dict[int, str]]:
    """What the head fed, and the requests' ids by session."""
    frames: dict[int, Frame] = {}
    requests: dict[int, str] = {}
    for r in records:
        if r.kind is Kind.OPENED:
            requests[r.numbers[0]] = r.text
        elif r.kind is Kind.FED:
            num_tokens, is_sampled, *sessions = r.numbers
            frames[r.seq] = Frame(r.seq, r.began, num_tokens, bool(is_sampled), tuple(sessions))
        elif r.kind is Kind.RETURNED and (frame := frames.get(r.seq)) is not None:
            frame.returned = r.began, r.ended
            frame.drawn = dict(zip(r.numbers[::2], r.numbers[1::2], strict=True))
    return frames, requests


def _spans(
    rank: int, records: Sequence[Record], frames: Mapping[int, Frame], head_rank: int
) -> Iterable[Span]:
    """One node's, queueing and computing reckoned from what stands around them."""
    arrived: dict[int, float] = {}
    if rank == head_rank:
        arrived = {seq: frame.fed for seq, frame in frames.items()}
    built: dict[int, float] = {}
    device_free = float("-inf")
    for r in records:
        if r.kind is Kind.ARRIVED and r.numbers[1] == ring_pb2.STEP:
            arrived[r.seq] = r.ended
        elif r.kind is Kind.BUILT:
            if (since := arrived.get(r.seq)) is not None and r.began > since:
                yield Span(rank, Part.QUEUE, "waits for its turn", since, r.began, r.seq)
            built[r.seq] = r.ended
        elif r.kind is Kind.LAYERS:
            yield from _layers(rank, r)
        elif r.kind is Kind.COMPUTED:
            dispatched = built.pop(r.seq, r.began)  # the device has its work from here on
            began = max(dispatched, device_free)
            if dispatched < device_free < r.ended:
                yield Span(rank, Part.QUEUE, "waits for the device", dispatched, device_free, r.seq)
            if began < r.ended:
                yield Span(rank, Part.COMPUTE, "compute", began, r.ended, r.seq)
            device_free = r.ended
        if r.kind in _PARTS and r.ended > r.began:
            part, name = _PARTS[r.kind]
            yield Span(rank, part, name, r.began, r.ended, r.seq, _args(r))


def _layers(rank: int, record: Record) -> Iterable[Span]:
    start, stop = record.numbers
    name = (
        f"layers {start}:{stop}" if stop - start > 1 else f"layer {start}" if start < stop else "norm, head"
    )
    yield Span(rank, Part.COMPUTE, name, record.began, record.ended, record.seq)


def _args(record: Record) -> dict[str, Any]:
    if record.kind in (Kind.ENCODED, Kind.SENT, Kind.ARRIVED):
        direction = "from" if record.kind is Kind.ARRIVED else "to"
        return {"bytes": record.numbers[0], direction: record.peer}
    if record.kind is Kind.BUILT:
        return {"rows": record.numbers[0], "tokens": record.numbers[1]}
    return {}
