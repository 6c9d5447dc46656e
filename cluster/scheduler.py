"""The head's scheduler: which chunk of which request enters the ring next. A state machine without IO.

Events are method calls, instructions are what they return; the caller holds one lock around both.
Prompts are cut as mlx-lm cuts them: chunks of all tokens but the last, then the last one alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster import turns
from cluster.instructions import Emit, Fail, FailureKind, Instruction, Send, Start
from cluster.kept import MIN_COMMON, Kept, KeptSessions
from cluster.request import Request
from cluster.room import Limits, has_room, too_much, why_never
from cluster.waiting import Waiting
from proto import ring_pb2


@dataclass(slots=True)
class Counters:
    """Totals since the head started, for metrics."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of these, not read again
    num_completion_tokens: int = 0
    num_failed: int = 0
    num_cancelled: int = 0


@dataclass(slots=True)
class Scheduler:
    """Many requests, one ring: admission, chunked prefill, rows that share frames, closes.

    `submit`, `cancel`, `expire`, `on_result`, `ring_up` and `ring_down` are the events.
    """

    max_queued: int
    queue_timeout_s: float | None = None  # a request waits at most so long; None: for ever
    counters: Counters = field(default_factory=Counters)
    _limits: Limits | None = None
    _epoch: int = 0
    _down_reason: str = "the ring is starting"
    _hold_reason: str = ""  # why no new request may start; empty: they may
    _next_session: int = 1
    _next_seq: int = 1
    _queued: Waiting = field(default_factory=Waiting)
    _active: deque[Request] = field(default_factory=deque)  # rotated: whoever was sent last is last
    _by_id: dict[str, Request] = field(default_factory=dict)
    _by_session: dict[int, Request] = field(default_factory=dict)
    _in_flight: dict[int, tuple[int, ...]] = field(default_factory=dict)  # seq -> sessions
    _chunks: set[int] = field(default_factory=set)  # of those, the frames of prompts
    _num_read: int = 0  # frames of prompts so far
    _closes: list[int] = field(default_factory=list)
    _keeps: list[int] = field(default_factory=list)
    _kept: KeptSessions = field(default_factory=KeptSessions)
    _leaving: list[int] = field(
        default_factory=list
    )  # kept no more; closed once nobody waits to begin with it

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_kept(self) -> int:
        """Ended sessions whose caches stay for prompts that begin like them."""
        return len(self._kept)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def is_up(self) -> bool:
        return self._limits is not None

    @property
    def requests(self) -> list[Request]:
        """Those that run or wait, in the order in which they came."""
        return list(self._by_id.values())

    def ring_up(self, epoch: int, limits: Limits) -> None:
        """The ring serves this epoch from now on."""
        self._epoch, self._limits = epoch, limits

    def ring_down(self, reason: str) -> list[Instruction]:
        """The ring broke or stops: every request ends now, and no frame of it is expected back."""
        self._limits, self._down_reason = None, reason
        failed: list[Instruction] = [
            Fail(request.request_id, FailureKind.UNAVAILABLE, reason) for request in self._by_id.values()
        ]
        self.counters.num_failed += len(failed)
        for state in (
            self._queued,
            self._active,
            self._by_id,
            self._by_session,
            self._in_flight,
            self._chunks,
            self._closes,
            self._keeps,
            self._kept,
            self._leaving,
        ):
            state.clear()
        return failed

    def hold(self, reason: str) -> list[Instruction]:
        """Until it is called with an empty reason no request starts: new ones are refused, others wait.

        Nothing is kept meanwhile.
        """
        self._hold_reason = reason
        if reason:
            self._leaving += self._kept.clear()
        return self._advance()

    def refuse_queued(self) -> list[Instruction]:
        """The hold lasts: those that wait are told so, as new ones are."""
        return [self._fail(request, self._hold_reason, FailureKind.BUSY) for request in list(self._queued)]

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: ring_pb2.Sampling,
        adapter: str = "",
        *,
        trace_id: str = "",
        priority: int = 0,
        now_s: float = 0.0,
    ) -> list[Instruction]:
        """A new request: it is started, queued, or refused with a sentence. A lower priority goes first."""
        self.counters.num_requests += 1
        refusal = self._refusal(request_id, prompt, max_tokens)
        if refusal is not None:
            self.counters.num_failed += 1
            return [refusal]
        request = Request(
            request_id,
            self._next_session,
            prompt,
            max_tokens,
            sampling,
            frozenset(sampling.stop_ids),
            adapter,
            trace_id,
            priority,
            now_s,
        )
        self._next_session += 1
        self._by_id[request_id] = request
        self._queued.add(request)
        return self._advance()

    def expire(self, now_s: float) -> list[Instruction]:
        """It is `now_s`: who has waited too long is told so. Called again and again."""
        if self.queue_timeout_s is None or not self._queued:
            return []
        late = self._queued.since(now_s - self.queue_timeout_s)
        if not late:
            return []
        why = (
            f"the request waited {self.queue_timeout_s:g} s for its turn, which is what api.queue_timeout_s "
            f"allows: {len(self._active)} requests run and {len(self._queued)} wait; try again later"
        )
        failed: list[Instruction] = [self._fail(request, why, FailureKind.LATE) for request in late]
        return failed + self._advance()

    def cancel(self, request_id: str) -> list[Instruction]:
        """The client left: the request ends without a word, and every stage frees it."""
        request = self._by_id.get(request_id)
        if request is None:
            return []
        self.counters.num_cancelled += 1
        self._end(request)
        return self._advance()

    def on_result(self, epoch: int, seq: int, slots: Iterable[ring_pb2.Slot]) -> list[Instruction]:
        """A frame came back from the last stage."""
        if epoch != self._epoch or self._limits is None or seq not in self._in_flight:
            return []
        self._chunks.discard(seq)
        # Those missing here were cancelled while their frame was in the ring.
        due = {s: self._by_session[s] for s in self._in_flight.pop(seq) if s in self._by_session}
        instructions: list[Instruction] = []
        for slot in slots:
            request = due.pop(slot.session, None)
            if request is None:
                continue
            request.num_in_flight -= 1
            if slot.error:
                instructions.append(self._fail(request, slot.error))
            elif slot.is_sampled:
                instructions.append(self._take(request, slot.result))
            elif not request.num_in_flight and not request.can_send:
                instructions.append(self._fail(request, "the last stage drew no token"))
        left_out = [self._fail(r, "the last stage left it out of a frame's result") for r in due.values()]
        return instructions + left_out + self._advance()

    def _refusal(self, request_id: str, prompt: Sequence[int], max_tokens: int) -> Fail | None:
        def refuse(kind: FailureKind, message: str) -> Fail:
            return Fail(request_id, kind, message)

        limits = self._limits
        if limits is None:
            return refuse(FailureKind.UNAVAILABLE, self._down_reason)
        if request_id in self._by_id:
            return refuse(
                FailureKind.INVALID, f"request id {request_id!r} is already running; choose another"
            )
        if never := why_never(limits, prompt, max_tokens):
            return refuse(FailureKind.INVALID, never)
        if self._hold_reason:
            return refuse(FailureKind.BUSY, self._hold_reason)
        if len(self._queued) >= self.max_queued and (
            self._queued or not has_room(limits, self._active, len(prompt) + max_tokens)
        ):
            return refuse(
                FailureKind.BUSY,
                f"{len(self._active)} requests are running and {len(self._queued)} are waiting, which is all "
                "that this plan and queue hold; try again later",
            )
        return None

    def _take(self, request: Request, token: ring_pb2.SampledToken) -> Emit:
        request.num_completion += 1
        self.counters.num_completion_tokens += 1
        finish = ""
        if token.id in request.stop_ids:
            finish = "stop"
        elif request.num_completion >= request.max_tokens:
            finish = "length"
        if finish:
            self._end(request)
        else:
            request.next_token = token.id
            request.written.append(token.id)
        return Emit(
            request.request_id,
            token,
            finish,
            num_prompt=len(request.prompt),
            num_completion=request.num_completion,
            num_cached=request.num_cached,
        )

    def _fail(self, request: Request, message: str, kind: FailureKind = FailureKind.FAILED) -> Fail:
        self.counters.num_failed += 1
        self._end(request, is_sound=False)
        return Fail(request.request_id, kind, message)

    def _end(self, request: Request, *, is_sound: bool = True) -> None:
        del self._by_id[request.request_id]
        if self._by_session.pop(request.session, None) is None:
            self._queued.remove(request)
            return
        self._active.remove(request)
        if not request.is_open:
            return
        limits = self._limits
        if not is_sound or limits is None or limits.trim_window < 0 or self._hold_reason:
            self._closes.append(request.session)
            return
        tokens = request.sent_tokens
        if len(tokens) < MIN_COMMON:
            self._closes.append(request.session)
            return
        self._kept.add(Kept(request.session, tokens, request.adapter, limits.share(len(tokens))))
        self._keeps.append(request.session)

    def _advance(self) -> list[Instruction]:
        """Fill the ring: admit what fits, then send the next chunk of whoever waited longest."""
        limits = self._limits
        if limits is None:
            return []
        fits = partial(has_room, limits, self._active)
        while not self._hold_reason and (r := self._queued.take(fits, len(self._active))) is not None:
            self._admit(r, limits)
        for session in too_much(limits, self._active, self._kept):
            self._forget(session)
        sends: list[Instruction] = []
        while len(self._in_flight) < limits.max_in_flight:
            num_chunks = len(self._chunks)
            num_rows = len(self._in_flight) - num_chunks
            due = turns.due(
                self._active, limits, num_rows=num_rows, num_chunks=num_chunks, num_read=self._num_read
            )
            if due is None:
                break
            rows = [due] if due.is_chunk_due else turns.rows_with(due, self._active, limits)
            for request in rows:
                self._active.remove(request)
            self._active.extend(rows)
            if not due.is_open:
                sends.append(Start(due.request_id))
            sends.append(Send(self._chunk(due, limits) if due.is_chunk_due else self._row_frame(rows)))
        self._let_go()
        if self._closes or self._keeps:  # nothing to ride on: memory is freed now, not with the next request
            sends.append(Send(self._header(())))
        return sends

    def _admit(self, request: Request, limits: Limits) -> None:
        """It waits no longer. What another session has read already, it does not read again."""
        self.counters.num_prompt_tokens += len(request.prompt)
        request.is_active = True
        self._active.append(request)
        self._by_session[request.session] = request
        if limits.trim_window < 0:
            return
        match = self._kept.match(request.prompt, request.adapter, limits.trim_window)
        if match is None:
            return
        source, num_common = match
        request.from_session, request.num_cached, request.num_sent = source.session, num_common, num_common
        self.counters.num_cached_tokens += num_common
        if num_common == len(source.tokens):
            self._forget(source.session)  # the new session goes on where it ended

    def _forget(self, session: int) -> None:
        self._kept.remove(session)
        self._leaving.append(session)

    def _let_go(self) -> None:
        """Those that leave are closed, but for such as a request that has not begun yet begins with."""
        wanted = {request.from_session for request in self._active if not request.is_open}
        self._closes += [session for session in self._leaving if session not in wanted]
        self._leaving = [session for session in self._leaving if session in wanted]

    def _header(self, sessions: tuple[int, ...]) -> ring_pb2.Frame:
        self._let_go()
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=self._epoch, seq=self._next_seq, closes=self._closes)
        frame.keeps.extend(session for session in self._keeps if session not in frame.closes)
        self._closes.clear()
        self._keeps.clear()
        if sessions:
            self._in_flight[self._next_seq] = sessions
        self._next_seq += 1
        return frame

    def _chunk(self, request: Request, limits: Limits) -> ring_pb2.Frame:
        """The next part of a prompt, by itself."""
        begins, request.is_open = not request.is_open, True
        frame = self._header((request.session,))
        self._chunks.add(frame.seq)
        self._num_read += 1
        if begins:
            frame.opens.add(
                session=request.session,
                prompt_tokens=len(request.prompt),
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                adapter=request.adapter,
                request_id=request.trace_id,
                from_session=request.from_session,
                from_tokens=request.num_cached,
            )
        position = request.num_sent
        rest = len(request.prompt) - position
        count = 1 if rest == 1 else min(rest - 1, turns.chunk_tokens(self._active, limits))
        self._add_slot(frame, request, request.prompt[position : position + count])
        return frame

    def _row_frame(self, rows: Sequence[Request]) -> ring_pb2.Frame:
        """One token of each request."""
        frame = self._header(tuple(request.session for request in rows))
        frame.is_batched = len(rows) > 1
        for request in rows:
            if request.is_prefilling:
                token = request.prompt[-1]
            else:
                assert request.next_token is not None
                token, request.next_token = request.next_token, None
            self._add_slot(frame, request, (token,))
        return frame

    @staticmethod
    def _add_slot(frame: ring_pb2.Frame, request: Request, tokens: Sequence[int]) -> None:
        position = request.num_sent
        request.num_sent += len(tokens)
        request.num_in_flight += 1
        frame.slots.add(
            session=request.session,
            position=position,
            tokens=tokens,
            is_sampled=not request.is_prefilling,
        )
