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
from cluster.draft_asks import DraftAsks
from cluster.instructions import Emit, Fail, FailureKind, Instruction, Send, Start
from cluster.ngrams import NO_GUESS, NGrams
from cluster.prefix_cache import PrefixCache
from cluster.prompt_points import next_end
from cluster.request import Request
from cluster.rewind import may_go_ahead, position_after
from cluster.room import Limits, has_room, why_never
from cluster.speculation import Drafting, Speculation, Window
from cluster.waiting import Waiting
from proto import ring_pb2
from shard_loader.reach import Reach


@dataclass(slots=True)
class Counters:
    """Totals since the head started, for metrics."""

    num_requests: int = 0
    num_prompts: int = 0  # that entered the ring
    num_cached_prompts: int = 0  # of these, begun with what is kept
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
    _keeps: dict[int, int] = field(default_factory=dict)  # session -> how many of its tokens
    _kept: PrefixCache = field(default_factory=PrefixCache)
    speculation: Speculation = field(default_factory=Speculation)
    _drafts: DraftAsks = field(default_factory=DraftAsks)

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
        self.speculation.max_drafts = limits.max_drafts if limits.reach > Reach.NONE else 0
        self.speculation.is_reread = limits.reach == Reach.MARK
        self.speculation.has_ngrams = limits.has_ngrams

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
            self._drafts,
        ):
            state.clear()
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

    def on_result(
        self, epoch: int, seq: int, slots: Iterable[ring_pb2.Slot], trip_ms: float = 0.0
    ) -> list[Instruction]:
        """A frame came back from the last stage, `trip_ms` after it was sent; 0: not measured."""
        if epoch != self._epoch or self._limits is None or seq not in self._in_flight:
            return []
        self._chunks.discard(seq)
        sessions = self._in_flight.pop(seq)
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
            if slot.error:
                instructions.append(self._fail(request, slot.error))
            elif slot.is_sampled:
                instructions += self._verdict(request, slot, trip_ms)
            elif not request.num_in_flight and not request.can_send:
                instructions.append(self._fail(request, "the last stage drew no token"))
        left_out = [self._fail(r, "the last stage left it out of a frame's result") for r in due.values()]
        return instructions + left_out + self._advance()

    def on_drafted(
        self, session: int, position: int, ids: Sequence[int], draft_ms: float = 0.0
    ) -> list[Instruction]:
        """The draft model says what may follow the first `position` tokens, `draft_ms` after it was asked."""
        request = self._by_session.get(session)
        is_news = self._drafts.tell(self.speculation, request, position, ids, draft_ms)
        return self._advance() if is_news else []

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

    def _verdict(self, request: Request, slot: ring_pb2.Slot, trip_ms: float) -> list[Instruction]:
        """What was drawn after a window's tokens: they are the answer's, unless the window was void."""
        window = request.windows.popleft()
        if window.is_void:
            return []
        drawn = [slot.result, *slot.more]
        ids = [token.id for token in drawn]
        if ids[:-1] != list(window.guesses[: len(ids) - 1]):
            return [self._fail(request, "the last stage drew tokens behind a wrong guess")]
        if window.is_alone and trip_ms:
            self.speculation.trips.add(len(window.tokens), trip_ms)
        after = request.windows[0] if request.windows else None
        if request.drafting is not None:
            self.speculation.judge(request.drafting, window, ids, after)
        emits: list[Instruction] = []
        for token in drawn:
            emits.append(emit := self._take(request, token))
            if emit.finish_reason:
                return emits
        if request.drafting is not None:
            request.drafting.extend(ids)
        if after is not None and len(ids) == window.num_draws and after.tokens[0] == ids[-1]:
            after.is_ahead = False  # what it begins with is known now
            return emits
        for wrong in request.windows:
            wrong.is_void = True
        if after is not None or len(ids) < window.num_draws:
            assert self._limits is not None
            request.num_sent = position_after(request, window, self._limits.reach)
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
        self._drafts.end(request)
        if not request.is_open:
            return
        limits = self._limits
        num_kept = 0
        if is_sound and limits is not None and not self._hold_reason:
            num_kept = self._kept.keep(request, limits)
        if num_kept:
            self._keeps[request.session] = num_kept
        else:
            self._closes.append(request.session)

    def _advance(self) -> list[Instruction]:
        """Fill the ring: admit what fits, then send the next chunk of whoever waited longest."""
        limits = self._limits
        if limits is None:
            return []
        fits = partial(has_room, limits, self._active)
        while not self._hold_reason and (r := self._queued.take(fits, len(self._active))) is not None:
            self._admit(r, limits)
        self._kept.make_room(limits, self._active)
        sends = self._drafts.due(self._epoch, limits, self._active, self.speculation)
        while len(self._in_flight) < limits.max_in_flight:
            num_chunks = len(self._chunks)
            num_rows = len(self._in_flight) - num_chunks
            due = turns.due(
                self._active, limits, num_rows=num_rows, num_chunks=num_chunks, num_read=self._num_read
            )
            if due is None:
                ahead = self._ahead(limits)
                if ahead is None:
                    break
                sends.append(Send(ahead))
                continue
            rows = turns.rows_with(due, self._active, limits) if due.is_row_due else [due]
            for request in rows:
                self._active.remove(request)
            self._active.extend(rows)
            if not due.is_open:
                sends.append(Start(due.request_id))
            if due.is_chunk_due:
                sends.append(Send(self._chunk(due, limits)))
            else:
                sends.append(Send(self._window(due) if len(rows) == 1 else self._row_frame(rows)))
        sends += self._drafts.due(self._epoch, limits, self._active, self.speculation)
        self._closes += self._kept.let_go(self._active)
        if self._closes or self._keeps:  # nothing to ride on: memory is freed now, not with the next request
            sends.append(Send(self._header(())))
        return sends

    def _admit(self, request: Request, limits: Limits) -> None:
        """It waits no longer. What another session has read already, it does not read again."""
        self.counters.num_prompts += 1
        self.counters.num_prompt_tokens += len(request.prompt)
        request.is_active = True
        self._active.append(request)
        self._by_session[request.session] = request
        if self.speculation.max_drafts and not request.sampling.logprobs:
            request.drafting = Drafting(NGrams(request.prompt))
            if limits.has_drafter:
                self._drafts.admit(request)
        busy = {session for sessions in self._in_flight.values() for session in sessions}
        self._kept.begin(request, limits, busy)
        self.counters.num_cached_tokens += request.num_cached
        self.counters.num_cached_prompts += request.num_cached > 0

    def _header(self, sessions: tuple[int, ...]) -> ring_pb2.Frame:
        self._closes += self._kept.let_go(self._active)
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=self._epoch, seq=self._next_seq, closes=self._closes)
        for session, num_tokens in self._keeps.items():
            if session not in frame.closes:
                frame.keeps.append(session)
                frame.keep_tokens.append(num_tokens)
        self._closes.clear()
        self._keeps.clear()
        if sessions:
            self._in_flight[self._next_seq] = sessions
        self._next_seq += 1
        return frame

    def _chunk(self, request: Request, limits: Limits) -> ring_pb2.Frame:
        """The next part of a prompt, by itself."""
        begins, request.is_open = not request.is_open, True
        position = request.num_sent
        chunk_tokens = turns.chunk_tokens(self._active, limits)
        end = next_end(position, len(request.prompt), chunk_tokens, request.points)
        copy = self._next_session
        is_copied = not self._hold_reason and self._kept.copy(request, end, limits, self._active, copy)
        frame = self._header((request.session, copy) if is_copied else (request.session,))
        self._chunks.add(frame.seq)
        self._num_read += 1
        if is_copied:
            self._next_session += 1
            frame.forks.add(session=copy, from_session=request.session)
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
        self._add_slot(frame, request, request.prompt[position:end])
        return frame

    def _row_frame(self, rows: Sequence[Request]) -> ring_pb2.Frame:
        """One token of each request."""
        frame = self._header(tuple(request.session for request in rows))
        frame.is_batched = True
        for request in rows:
            self._add_slot(frame, request, request.known(request.num_sent, request.num_known))
        return frame

    def _window(self, request: Request) -> ring_pb2.Frame:
        """The known tokens of one request that are due, with guesses of what follows if that is worth it."""
        known = request.known(request.num_sent, request.num_known)
        guess = NO_GUESS
        if request.drafting is not None and self._is_roomy:
            guess = self.speculation.guess(request.drafting, len(known), request.room)
        return self._lone(request, [*known, *guess.tokens], len(guess.tokens) + 1, guess.match)

    def _ahead(self, limits: Limits) -> ring_pb2.Frame | None:
        """Guesses that follow those whose verdict is not back, where a frame would else not be used."""
        if not self._is_roomy or self._chunks:
            return None
        for request in self._active:
            if request.drafting is None or not may_go_ahead(request, limits):
                continue
            guess = self.speculation.guess_ahead(request.drafting, request.live, request.ahead, request.room)
            num_after = request.num_sent + len(guess.tokens)
            if guess.tokens and (limits.reach == Reach.ANY or num_after < limits.trim_window):
                return self._lone(request, guess.tokens, len(guess.tokens), guess.match, is_ahead=True)
        return None

    @property
    def _is_roomy(self) -> bool:
        """There are frames enough for each request to have one of its own: none waits for a guess."""
        assert self._limits is not None
        return len(self._active) <= self._limits.max_in_flight

    def _lone(
        self, request: Request, tokens: Sequence[int], num_draws: int, match: int, *, is_ahead: bool = False
    ) -> ring_pb2.Frame:
        is_alone = not self._in_flight
        frame = self._header((request.session,))
        window = self._add_slot(frame, request, tokens)
        assert window is not None
        window.num_draws, window.match = num_draws, match
        window.is_ahead, window.is_alone = is_ahead, is_alone
        if num_draws > 1:
            frame.slots[0].num_draws = num_draws
        return frame

    @staticmethod
    def _add_slot(frame: ring_pb2.Frame, request: Request, tokens: Sequence[int]) -> Window | None:
        """The request's next tokens; None: no token is drawn after them."""
        position = request.num_sent
        request.num_sent += len(tokens)
        request.num_read = request.num_sent
        request.num_in_flight += 1
        is_sampled = not request.is_prefilling
        frame.slots.add(session=request.session, position=position, tokens=tokens, is_sampled=is_sampled)
        if not is_sampled:
            return None
        window = Window(position, tokens)
        request.windows.append(window)
        request.last_window = window
        return window
