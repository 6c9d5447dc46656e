"""The head's scheduler: which chunk of which request enters the ring next. A state machine without IO.

Events are method calls, instructions are what they return; the caller holds one lock around both.
Prompts are cut as mlx-lm cuts them: chunks of all tokens but the last, then the last one alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from cluster.foretold import Foretold
from cluster.instructions import Draft, Emit, EndDrafts, Fail, FailureKind, Instruction, Send, Start
from cluster.kept import MIN_COMMON, Kept, KeptSessions
from cluster.ngrams import NO_GUESS, NGrams
from cluster.request import Request
from cluster.rewind import kept_length, may_go_ahead, position_after
from cluster.room import Limits, has_room, too_much, why_never
from cluster.speculation import DRAFTED, Drafting, Speculation, Window
from proto import ring_pb2
from shard_loader.reach import Reach


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

    `submit`, `cancel`, `on_result`, `ring_up` and `ring_down` are the events.
    """

    max_queued: int
    counters: Counters = field(default_factory=Counters)
    _limits: Limits | None = None
    _epoch: int = 0
    _down_reason: str = "the ring is starting"
    _hold_reason: str = ""  # why no new request may start; empty: they may
    _next_session: int = 1
    _next_seq: int = 1
    _queued: deque[Request] = field(default_factory=deque)
    _active: deque[Request] = field(default_factory=deque)  # rotated: whoever was sent last is last
    _by_id: dict[str, Request] = field(default_factory=dict)
    _by_session: dict[int, Request] = field(default_factory=dict)
    _in_flight: dict[int, tuple[int, ...]] = field(default_factory=dict)  # seq -> sessions
    _chunks: set[int] = field(default_factory=set)  # of those, the frames of prompts
    _closes: list[int] = field(default_factory=list)
    _keeps: dict[int, int] = field(default_factory=dict)  # session -> how many of its tokens
    _kept: KeptSessions = field(default_factory=KeptSessions)
    _leaving: list[int] = field(
        default_factory=list
    )  # kept no more; closed once nobody waits to begin with it
    speculation: Speculation = field(default_factory=Speculation)
    _unread: list[Request] = field(default_factory=list)  # whose prompts the draft model has not been given
    _undrafted: list[int] = field(default_factory=list)  # ended sessions that the draft model may forget

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
            self._leaving,
            self._unread,
            self._undrafted,
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
    ) -> list[Instruction]:
        """A new request: it is started, queued, or refused with a sentence."""
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
        )
        self._next_session += 1
        self._by_id[request_id] = request
        self._queued.append(request)
        return self._advance()

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
        foretold = None if request is None or request.drafting is None else request.drafting.foretold
        if foretold is None:
            return []
        was_held, num_asked = foretold.is_held, foretold.num_asked
        if not foretold.tell(position, ids):
            return []
        if was_held and draft_ms:
            self.speculation.learn_draft(min(len(ids) + 1, num_asked), draft_ms)
        return self._advance()

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
            request.drafting.text.extend(ids)
            if request.drafting.foretold is not None:
                request.drafting.acceptance.add(DRAFTED, *request.drafting.foretold.extend(ids))
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
        if request.drafting is not None and request.drafting.foretold is not None:
            self._undrafted.append(request.session)
        if not request.is_open:
            return
        limits = self._limits
        if not is_sound or limits is None or limits.trim_window < 0 or self._hold_reason:
            self._closes.append(request.session)
            return
        length = kept_length(request, limits)
        if length < MIN_COMMON:
            self._closes.append(request.session)
            return
        tokens = request.known(0, length)
        self._kept.add(Kept(request.session, tokens, request.adapter, limits.share(len(tokens))))
        self._keeps[request.session] = length

    def _advance(self) -> list[Instruction]:
        """Fill the ring: admit what fits, then send the next chunk of whoever waited longest."""
        limits = self._limits
        if limits is None:
            return []
        while (
            self._queued
            and not self._hold_reason
            and has_room(limits, self._active, self._queued[0].num_reserved)
        ):
            self._admit(self._queued.popleft(), limits)
        for session in too_much(limits, self._active, self._kept):
            self._forget(session)
        sends: list[Instruction] = [EndDrafts(session) for session in self._undrafted]
        self._undrafted.clear()
        for request in self._unread if self._is_roomy else ():
            prompt = request.prompt
            sends.append(Draft(self._epoch, request.session, prompt, 0, request.sampling, len(prompt)))
        self._unread.clear()
        sends += self._asks(limits)
        while len(self._in_flight) < limits.max_in_flight:
            due = self._due(limits)
            if due is None:
                ahead = self._ahead(limits)
                if ahead is None:
                    break
                sends.append(Send(ahead))
                continue
            rows = self._rows(due, limits) if due.is_row_due else [due]
            for request in rows:
                self._active.remove(request)
            self._active.extend(rows)
            if not due.is_open:
                sends.append(Start(due.request_id))
            if due.is_chunk_due:
                sends.append(Send(self._chunk(due, limits)))
            else:
                sends.append(Send(self._window(due) if len(rows) == 1 else self._row_frame(rows)))
        sends += self._asks(limits)
        self._let_go()
        if self._closes or self._keeps:  # nothing to ride on: memory is freed now, not with the next request
            sends.append(Send(self._header(())))
        return sends

    def _asks(self, limits: Limits) -> list[Instruction]:
        """What the draft model is to guess: what a frame waits for, or what may follow those on their way."""
        if not limits.has_drafter or not self._is_roomy:
            return []
        asks: list[Instruction] = []
        for request in self._active:
            drafting = request.drafting
            if drafting is None or (foretold := drafting.foretold) is None or not request.num_completion:
                continue
            if request.is_due and not foretold.ids:
                num_due = request.num_known - request.num_sent
                number = self.speculation.num_to_await(drafting, num_due, request.room)
                foretold.is_held = number > 0
                if foretold.is_awaited:
                    continue
            elif limits.drafts_ahead and request.live and not request.is_due:
                ahead = request.ahead
                if foretold.ids[: len(ahead)] != ahead:
                    continue
                number = self.speculation.num_to_ask_ahead(drafting, len(ahead), request.room)
            else:
                continue
            if number > 0:
                asks.append(self._ask(request, foretold, number))
        return asks

    def _ask(self, request: Request, foretold: Foretold, num_drafts: int) -> Draft:
        foretold.ask(num_drafts)
        tokens = [*request.known(0, request.num_known), *foretold.ids]
        return Draft(self._epoch, request.session, tokens, num_drafts, request.sampling, len(request.prompt))

    def _admit(self, request: Request, limits: Limits) -> None:
        """It waits no longer. What another session has read already, it does not read again."""
        self.counters.num_prompt_tokens += len(request.prompt)
        request.is_active = True
        self._active.append(request)
        self._by_session[request.session] = request
        if self.speculation.max_drafts and not request.sampling.logprobs:
            foretold = Foretold(len(request.prompt)) if limits.has_drafter else None
            request.drafting = Drafting(NGrams(request.prompt), foretold=foretold)
            if foretold is not None:
                self._unread.append(request)
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

    def _due(self, limits: Limits) -> Request | None:
        """Whose turn it is. One chunk at least is on its way while a prompt waits, of who came first.

        Otherwise answers go before prompts, and those before others that waited longest.
        """
        chunk = min((r for r in self._active if r.is_chunk_due), key=_came, default=None)
        if chunk is not None and not self._chunks:
            return chunk
        row = next((r for r in self._active if r.is_due), None)
        if row is not None:
            return row
        return chunk if not limits.max_chunks or len(self._chunks) < limits.max_chunks else None

    def _rows(self, first: Request, limits: Limits) -> list[Request]:
        """Those whose tokens go with the first one's: their share, if all are spread over the frames."""
        num_writing = sum(not request.is_chunk_due for request in self._active)
        share = -(-num_writing // limits.max_in_flight)
        due = (r for r in self._active if r.is_row_due and r.adapter == first.adapter)
        return list(islice(due, min(share, limits.max_rows)))

    def _chunk(self, request: Request, limits: Limits) -> ring_pb2.Frame:
        """The next part of a prompt, by itself."""
        begins, request.is_open = not request.is_open, True
        frame = self._header((request.session,))
        self._chunks.add(frame.seq)
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
        count = 1 if rest == 1 else min(rest - 1, limits.prefill_chunk)
        self._add_slot(frame, request, request.prompt[position : position + count])
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


def _came(request: Request) -> int:
    return request.session
