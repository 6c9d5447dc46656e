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
from cluster.counters import Counters
from cluster.foretold import Drafted
from cluster.guessing import Guessing
from cluster.instructions import Emit, Fail, FailureKind, Instruction, Score, Send, Start
from cluster.outbox import Outbox
from cluster.prefix_cache import PrefixCache
from cluster.request import Request
from cluster.room import Limits, has_room, lane_for, why_never
from cluster.speculation import Speculation
from cluster.waiting import Waiting
from proto import ring_pb2


@dataclass(slots=True)
class Scheduler:
    """Many requests, one ring: admission, chunked prefill, rows that share frames, closes.

    `submit`, `cancel`, `expire`, `on_result`, `ring_up` and `ring_down` are the events.
    """

    max_queued: int
    queue_timeout_s: float | None = None  # a request waits at most so long; None: for ever
    counters: Counters = field(default_factory=Counters)
    _limits: Limits | None = None
    _down_reason: str = "the ring is starting"
    _hold_reason: str = ""  # why no new request may start; empty: they may
    _next_session: int = 1
    _queued: Waiting = field(default_factory=Waiting)
    _active: deque[Request] = field(default_factory=deque)  # rotated: whoever was sent last is last
    _by_id: dict[str, Request] = field(default_factory=dict)
    _by_session: dict[int, Request] = field(default_factory=dict)
    _outbox: Outbox = field(default_factory=Outbox)
    _kept: PrefixCache = field(default_factory=PrefixCache)
    _guessing: Guessing = field(default_factory=Guessing)

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_kept(self) -> int:
        """Sessions whose caches only stay for prompts that begin like them."""
        return len(self._kept)

    @property
    def num_in_flight(self) -> int:
        return len(self._outbox.in_flight)

    @property
    def speculation(self) -> Speculation:
        """What was learned of guesses."""
        return self._guessing.speculation

    @property
    def is_up(self) -> bool:
        return self._limits is not None

    @property
    def requests(self) -> list[Request]:
        """Those that run or wait, in the order in which they came."""
        return list(self._by_id.values())

    def ring_up(self, epoch: int, limits: Limits) -> None:
        """The ring serves this epoch from now on."""
        self._outbox.epoch, self._limits = epoch, limits
        self._guessing.ring_up(limits)

    def ring_down(self, reason: str) -> list[Instruction]:
        """The ring broke or stops: every request ends now, and no frame of it is expected back."""
        self._limits, self._down_reason = None, reason
        failed: list[Instruction] = [
            Fail(request.request_id, FailureKind.UNAVAILABLE, reason) for request in self._by_id.values()
        ]
        self.counters.num_failed += len(failed)
        for state in (self._queued, self._active, self._by_id, self._by_session):
            state.clear()
        for part in (self._outbox, self._kept, self._guessing):
            part.clear()
        return failed

    def hold(self, reason: str) -> list[Instruction]:
        """Until it is called with an empty reason no request starts: new ones are refused, others wait.

        Nothing is kept meanwhile.
        """
        self._hold_reason = reason
        if reason:
            self._kept.drop_all()
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
        is_pooled = sampling.pooling.kind != ring_pb2.Pooling.NONE
        max_tokens = 0 if is_pooled else max_tokens
        refusal = self._refusal(request_id, prompt, max_tokens, is_pooled=is_pooled)
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

    def on_result(
        self, epoch: int, seq: int, slots: Iterable[ring_pb2.Slot], trip_ms: float = 0.0, now_ms: float = 0.0
    ) -> list[Instruction]:
        """A frame came back, `trip_ms` after it was sent, at `now_ms`; 0: not measured."""
        if epoch != self._outbox.epoch or self._limits is None:
            return []
        if (sessions := self._outbox.take(seq)) is None:
            return []
        # Those missing here were cancelled while their frame was in the ring.
        due = {s: self._by_session[s] for s in sessions if s in self._by_session}
        instructions: list[Instruction] = []
        for slot in slots:
            if slot.error:
                self._kept.distrust(sessions)
            request = due.pop(slot.session, None)
            if request is None:
                continue
            request.num_in_flight -= 1
            if slot.prompt:
                instructions.append(Score(request.request_id, slot.prompt))
            if slot.error and request.began_beside and not request.num_completion:
                self._begin_anew(request, self._limits)
            elif slot.error:
                instructions.append(self._fail(request, slot.error))
            elif slot.is_sampled:
                instructions += self._verdict(request, slot, trip_ms, now_ms)
            elif slot.vector:
                self._end(request)
                done = Emit(
                    request.request_id, slot.result, "stop", len(request.prompt), 0, vector=slot.vector
                )
                instructions.append(done)
            elif not request.num_in_flight and not request.can_send:
                instructions.append(self._fail(request, "the last stage drew no token"))
        left_out = [self._fail(r, "the last stage left it out of a frame's result") for r in due.values()]
        return instructions + left_out + self._advance()

    def on_drafted(self, session: int, drafted: Drafted, draft_ms: float = 0.0) -> list[Instruction]:
        """The draft model's answer, `draft_ms` after it was asked."""
        is_awaited = self._guessing.told(self._by_session.get(session), drafted, draft_ms)
        return self._advance() if is_awaited else []

    def _refusal(
        self, request_id: str, prompt: Sequence[int], max_tokens: int, *, is_pooled: bool
    ) -> Fail | None:
        def refuse(kind: FailureKind, message: str) -> Fail:
            return Fail(request_id, kind, message)

        limits = self._limits
        if limits is None:
            return refuse(FailureKind.UNAVAILABLE, self._down_reason)
        if request_id in self._by_id:
            return refuse(
                FailureKind.INVALID, f"request id {request_id!r} is already running; choose another"
            )
        if never := why_never(limits, prompt, max_tokens, is_pooled=is_pooled):
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

    def _verdict(
        self, request: Request, slot: ring_pb2.Slot, trip_ms: float, now_ms: float
    ) -> list[Instruction]:
        """What was drawn after a window's tokens: they are the answer's, unless the window was void."""
        window = request.windows.popleft()
        if window.is_void:
            return []
        drawn = [slot.result, *slot.more]
        ids = [token.id for token in drawn]
        if ids[:-1] != list(window.guesses[: len(ids) - 1]):
            return [self._fail(request, "the last stage drew tokens behind a wrong guess")]
        after = request.windows[0] if request.windows else None
        now_ms *= len(self._active) == 1  # others make gaps longer
        self._guessing.learn(request, window, ids, after, trip_ms, now_ms=now_ms)
        emits: list[Instruction] = []
        for token in drawn:
            emits.append(emit := self._take(request, token))
            if emit.finish_reason:
                return emits
        assert self._limits is not None
        self._guessing.judged(request, window, ids, after, self._limits)
        return emits

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
            request.written.append(token.id)
        return Emit(
            request.request_id,
            token,
            finish,
            num_prompt=len(request.prompt),
            num_completion=request.num_completion,
            num_cached=request.num_cached,
            session=request.session,
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
        self._guessing.end(request)
        if not request.is_open:
            return
        limits = self._limits
        num_kept = 0
        if is_sound and limits is not None and not self._hold_reason:
            num_kept = self._kept.keep(request, limits)
        if num_kept:
            self._outbox.keeps[request.session] = num_kept
        else:
            self._outbox.closes.append(request.session)

    def _advance(self) -> list[Instruction]:
        """Fill the ring: admit what fits, then send the next chunk of whoever waited longest."""
        limits = self._limits
        if limits is None:
            return []
        fits = partial(has_room, limits, self._active)
        while not self._hold_reason and (r := self._queued.take(fits, len(self._active))) is not None:
            self._admit(r, limits)
        self._kept.make_room(limits, self._active)
        outbox, active = self._outbox, self._active
        sends = self._guessing.asks(active, limits, outbox.epoch)
        while len(outbox.in_flight) < turns.max_frames(active, limits) and (
            frame := self._next(limits, sends)
        ):
            sends.append(Send(frame))
        sends += self._guessing.asks(active, limits, outbox.epoch)
        outbox.closes += self._kept.let_go(active, limits, self.counters)
        if outbox.closes or outbox.keeps:  # nothing to ride on: memory is freed now
            sends.append(Send(outbox.frame()))
        return sends

    def _next(self, limits: Limits, sends: list[Instruction]) -> ring_pb2.Frame | None:
        """The next frame, before which `sends` gets who starts with it; None: there is none to send now."""
        outbox, active = self._outbox, self._active
        self._kept.end_waits(self._by_session, limits, outbox, self.counters)
        due = turns.due(
            active,
            limits,
            num_rows=outbox.num_row_frames,
            num_chunks=len(outbox.chunks),
            num_read=outbox.num_chunks_sent,
        )
        if due is None:
            ahead = None if outbox.chunks else self._guessing.ahead(active, limits)
            return None if ahead is None else outbox.lone(ahead[0], ahead[1].tokens, ahead[1].match)
        rows, num_tokens = [due], 0
        if due.is_chunk_due and (more := self._kept.begin_beside(due, limits, active)):
            self.counters.add_cached(due.num_cached - more, due.num_cached)
            num_tokens = turns.next_part(due, turns.chunk_tokens(active, limits))
        elif due.is_chunk_due:
            rows, num_tokens = turns.prompts_with(due, active, limits)
        elif due.is_row_due:
            rows = turns.rows_with(due, active, limits)
        for request in rows:
            active.remove(request)
        active.extend(rows)
        sends += [Start(request.request_id) for request in rows if not request.is_open]
        if num_tokens:
            return self._prompts(rows, num_tokens, limits)
        outbox.closes += self._kept.let_go(active, limits, self.counters)
        if len(rows) > 1:
            return outbox.rows(rows)
        guess = self._guessing.behind(due, active, limits)
        return outbox.lone(due, guess.tokens, guess.match)

    def _prompts(self, rows: list[Request], num_tokens: int, limits: Limits) -> ring_pb2.Frame:
        """So many tokens of these prompts, copied behind them where others may begin there."""
        begins = [request for request in rows if not request.is_open]
        copies: dict[int, int] = {}
        for request in rows:
            request.is_open = True
            end = request.num_sent + num_tokens
            if not self._hold_reason and self._kept.copy(
                request, end, limits, self._active, self._next_session
            ):
                copies[request.session] = self._next_session
                self._next_session += 1
        self._outbox.closes += self._kept.let_go(self._active, limits, self.counters)
        return self._outbox.prompts(rows, num_tokens, copies, begins)

    def _admit(self, request: Request, limits: Limits) -> None:
        """It waits no longer. What another session has read already, it does not read again."""
        self.counters.num_prompts += 1
        self.counters.num_prompt_tokens += len(request.prompt)
        request.is_active, request.lane = True, lane_for(limits, self._active, request.num_reserved) or 0
        self._active.append(request)
        self._by_session[request.session] = request
        self._guessing.begin(request, limits)
        self._kept.begin(request, limits, self._outbox, self._active)
        self.counters.add_cached(0, request.num_cached)

    def _begin_anew(self, request: Request, limits: Limits) -> None:
        """What it began with may have failed on a stage, for which it cannot help: it reads all itself."""
        self._outbox.closes.append(request.session)
        self._guessing.end(request)
        self.counters.add_cached(request.num_cached, 0)
        del self._by_session[request.session]
        request.begin_anew(self._next_session)
        self._by_session[request.session] = request
        self._next_session += 1
        self._guessing.begin(request, limits)
