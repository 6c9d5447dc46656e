"""A discrete-event simulator of the ring: frames that queue at stages and links, one after another. Pure.

It knows nothing of the closed formulas of docs/cost_model.md, which are compared with it: only how long each
stage works on a frame and each link carries it, how many frames may be under way, and how the head sends
(cluster/scheduler.py): who waited longest goes first, all chunks of a prompt follow each other, then its last
token alone, and each token of the answer enters once the one before it is back.

Times are ms since the start. A ring of N stages has N + 1 links: from the head to the first stage, from stage
to stage, and from the last one back to the head.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StageTimes:
    """How long a stage works on a frame: one at a time, in the order of arrival."""

    decode_ms: float  # of one token; a prompt's last one is such a step too
    chunk_ms: tuple[float, ...] = ()  # of each chunk of the prompt before its last token
    rows_ms: tuple[float, ...] = ()  # of a token of each of 2, 3, ... users that share a frame


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """How long a link takes: frames go onto the line one after another, and arrive the latency later."""

    latency_ms: float = 0.0
    byte_ms: float = 0.0  # on the line
    decode_bytes: int = 0
    chunk_bytes: tuple[int, ...] = ()
    rows_bytes: tuple[int, ...] = ()  # of frames of 2, 3, ... users


@dataclass(frozen=True, slots=True)
class RingTimes:
    """A ring. Raises ValueError where stages, links and chunks do not match, or nothing may be under way."""

    stages: tuple[StageTimes, ...]
    links: tuple[LinkTimes, ...]
    max_in_flight: int  # frames in the ring at once

    def __post_init__(self) -> None:
        if not self.stages or len(self.links) != len(self.stages) + 1:
            raise ValueError(f"{len(self.stages)} stages need one link more, not {len(self.links)}")
        chunks = {len(stage.chunk_ms) for stage in self.stages} | {
            len(link.chunk_bytes) for link in self.links
        }
        if len(chunks) > 1:
            raise ValueError(f"stages and links must have the same number of chunks, not {sorted(chunks)}")
        if self.max_in_flight < 1:
            raise ValueError(f"max_in_flight = {self.max_in_flight} must be at least 1")

    @property
    def num_chunks(self) -> int:
        """Of a prompt, before its last token."""
        return len(self.stages[0].chunk_ms)

    def stations(self) -> list[_Station]:
        """Links and stages in the order in which a frame passes them."""
        found = []
        for i, link in enumerate(self.links):
            chunks_ms = tuple(nbytes * link.byte_ms for nbytes in link.chunk_bytes)
            steps_ms = tuple(nbytes * link.byte_ms for nbytes in (link.decode_bytes, *link.rows_bytes))
            found.append(_Station(f"link {i}", steps_ms, chunks_ms, link.latency_ms))
            if i < len(self.stages):
                stage = self.stages[i]
                steps_ms = (stage.decode_ms, *stage.rows_ms)
                found.append(_Station(f"stage {i}", steps_ms, stage.chunk_ms, 0.0))
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """One user: a prompt of all chunks of the ring or of its last token alone, and a fixed answer.

    rows: so many users whose tokens always share a frame; their prompts are not read here. Raises ValueError
    for an answer without tokens.
    """

    answer_tokens: int
    has_prompt: bool = False
    arrives_ms: float = 0.0
    rows: int = 1

    def __post_init__(self) -> None:
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens = {self.answer_tokens} must be at least 1")


@dataclass(frozen=True, slots=True)
class Passage:
    """One frame at one station, for a trace."""

    request: int
    frame: int  # of the request, from 0
    station: str  # "link 0", "stage 0", "link 1", ...
    arrived_ms: float
    began_ms: float
    ended_ms: float  # a link's latency comes after it


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of it: for each request the times of its tokens at the head."""

    arrivals_ms: tuple[float, ...]
    tokens_ms: tuple[tuple[float, ...], ...]
    stage_busy_ms: tuple[float, ...]
    rows: tuple[int, ...] = ()  # of each request
    trace: tuple[Passage, ...] = ()

    @property
    def span_ms(self) -> float:
        """Until the last token."""
        return max(times[-1] for times in self.tokens_ms)

    @property
    def stage_busy(self) -> tuple[float, ...]:
        """The share of that time which each stage worked."""
        return tuple(busy_ms / self.span_ms for busy_ms in self.stage_busy_ms)

    def ttft_ms(self, request: int = 0) -> float:
        """From its arrival to its first token."""
        return self.tokens_ms[request][0] - self.arrivals_ms[request]

    def decode_tok_s(self, request: int = 0) -> float:
        """Of one user: tokens after the first over the time after the first."""
        times = self.tokens_ms[request]
        return (len(times) - 1) * 1e3 / (times[-1] - times[0])

    def aggregate_tok_s(self) -> float:
        """Of all users, over the middle half of all tokens: without filling and draining the ring."""
        each = zip(self.tokens_ms, self.rows, strict=True)
        times = sorted(time for request, rows in each for time in request * rows)
        first, last = len(times) // 4, 3 * len(times) // 4
        return (last - first) * 1e3 / (times[last] - times[first])


def simulate(ring: RingTimes, requests: Sequence[Request], *, is_traced: bool = False) -> Simulated:
    """Runs all requests to their last token."""
    return _Run(ring, requests, is_traced).result()


@dataclass(slots=True)
class _Station:
    """A server that takes frames one at a time, in the order of arrival."""

    name: str
    steps_ms: tuple[float, ...]  # of frames of 1, 2, ... rows
    chunks_ms: tuple[float, ...]
    latency_ms: float
    free_at: float = 0.0
    busy_ms: float = 0.0

    def serve(self, now: float, chunk: int | None, rows: int) -> tuple[float, float]:
        """When a frame that arrives now begins and ends here; chunk None: one token of each row."""
        took_ms = self.steps_ms[rows - 1] if chunk is None else self.chunks_ms[chunk]
        began = max(now, self.free_at)
        self.free_at = began + took_ms
        self.busy_ms += took_ms
        return began, self.free_at


@dataclass(slots=True)
class _User:
    request: Request
    chunks_left: int
    num_sent: int = 0
    can_step: bool = True  # its next token is here
    tokens_ms: list[float] = field(default_factory=list)

    @property
    def can_send(self) -> bool:
        return bool(self.chunks_left) or self.can_step


class _Run:
    """Arrivals in the order of time. Where every station serves first come, first served, an arrival alone
    settles when its frame leaves.
    """

    def __init__(self, ring: RingTimes, requests: Sequence[Request], is_traced: bool) -> None:
        self._ring, self._stations, self._is_traced = ring, ring.stations(), is_traced
        self._users = [_User(r, ring.num_chunks if r.has_prompt else 0) for r in requests]
        self._waiting: deque[int] = deque()  # users that may send, or will: who sent last is last
        self._num_in_flight = 0
        self._trace: list[Passage] = []
        self._num_events = 0
        # (time, order, station or -1 for a new request, user, frame of the user, its chunk or None)
        self._events: list[tuple[float, int, int, int, int, int | None]] = []

    def result(self) -> Simulated:
        for user, request in enumerate(self._users):
            self._at(request.request.arrives_ms, -1, user, 0, None)
        while self._events:
            now, _, place, user, frame, chunk = heapq.heappop(self._events)
            if place == len(self._stations):
                self._come_back(now, user, chunk)
            elif place < 0:
                self._waiting.append(user)
                self._send(now)
            else:
                self._pass(now, place, user, frame, chunk)
        return Simulated(
            arrivals_ms=tuple(user.request.arrives_ms for user in self._users),
            tokens_ms=tuple(tuple(user.tokens_ms) for user in self._users),
            rows=tuple(user.request.rows for user in self._users),
            stage_busy_ms=tuple(station.busy_ms for station in self._stations[1::2]),
            trace=tuple(self._trace),
        )

    def _at(self, time: float, place: int, user: int, frame: int, chunk: int | None) -> None:
        heapq.heappush(self._events, (time, self._num_events, place, user, frame, chunk))
        self._num_events += 1

    def _pass(self, now: float, place: int, user: int, frame: int, chunk: int | None) -> None:
        station = self._stations[place]
        began, ended = station.serve(now, chunk, self._users[user].request.rows)
        if self._is_traced:
            self._trace.append(Passage(user, frame, station.name, now, began, ended))
        self._at(ended + station.latency_ms, place + 1, user, frame, chunk)

    def _come_back(self, now: float, number: int, chunk: int | None) -> None:
        user = self._users[number]
        self._num_in_flight -= 1
        if chunk is None:
            user.tokens_ms.append(now)
            user.can_step = len(user.tokens_ms) < user.request.answer_tokens
            if not user.can_step:
                self._waiting.remove(number)
        self._send(now)

    def _send(self, now: float) -> None:
        """The head fills the ring."""
        while self._num_in_flight < self._ring.max_in_flight:
            number = next((n for n in self._waiting if self._users[n].can_send), None)
            if number is None:
                return
            self._waiting.remove(number)
            self._waiting.append(number)
            user = self._users[number]
            chunk = None
            if user.chunks_left:
                chunk = self._ring.num_chunks - user.chunks_left
                user.chunks_left -= 1
            else:
                user.can_step = False
            self._num_in_flight += 1
            self._at(now, 0, number, user.num_sent, chunk)
            user.num_sent += 1
