"""What the draft model is asked, for which request and when. Pure; guarded by the scheduler's lock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.draft_pay import NUM_TRIAL
from cluster.foretold import Drafted, Foretold
from cluster.instructions import Draft, EndDrafts, Instruction
from cluster.request import Request
from cluster.room import Limits
from cluster.speculation import Speculation, Window
from planner.draft_bytes import MAX_LOGIT_ROWS, READ_CHUNK_TOKENS


@dataclass(slots=True)
class DraftAsks:
    """Prompts are given to it to read as they begin; guesses are such as a frame waits for, or such as may
    follow those on their way.
    """

    _unread: list[Request] = field(default_factory=list)  # their prompts have not been given to it
    _ended: list[EndDrafts] = field(default_factory=list)

    def clear(self) -> None:
        """All requests are over, and it forgets them itself."""
        self._unread.clear()
        self._ended.clear()

    def admit(self, request: Request, speculation: Speculation) -> None:
        """It begins; where the draft model has not paid of late, without it."""
        if request.drafting is not None:
            request.drafting.foretold = Foretold(len(request.prompt))
            request.drafting.pay = pay = speculation.record.begin()
            if not pay.is_paused:
                self._unread.append(request)

    def end(self, request: Request) -> None:
        """It ended, one way or another."""
        if request.drafting is not None and request.drafting.foretold is not None:
            self._ended.append(EndDrafts(request.session))

    def tell(
        self,
        speculation: Speculation,
        request: Request | None,
        drafted: Drafted,
        draft_ms: float,
    ) -> bool:
        """The draft model's answer; False where nobody waits for it."""
        speculation.num_drafted += len(drafted.ids)
        drafting = None if request is None else request.drafting
        if drafting is None or (foretold := drafting.foretold) is None or drafting.pay is None:
            return False
        was_held, was_reading = foretold.is_held, foretold.is_reading
        if not foretold.tell(drafted.position, drafted.ids):
            return False
        if was_reading:
            speculation.learn_reading(drafted.num_read, drafted.own_ms)
            return True
        drafting.pay.own_ms += drafted.own_ms
        drafting.pay.held_ms += draft_ms if was_held else 0.0
        took_ms = draft_ms if was_held else drafted.own_ms
        if took_ms and drafted.num_read <= MAX_LOGIT_ROWS:  # else it is not its draws that took so long
            speculation.learn_draft(min(len(drafted.ids) + 1, foretold.num_asked), took_ms)
        return True

    def judge(
        self, speculation: Speculation, request: Request, window: Window, num_tokens: int, now_ms: float
    ) -> None:
        """What it was worth for a window of which `num_tokens` came."""
        if request.drafting is not None:
            speculation.judge_draft(request.drafting, window, num_tokens, now_ms)
            self._rest(request)

    def due(
        self, epoch: int, limits: Limits, active: Iterable[Request], speculation: Speculation
    ) -> list[Instruction]:
        """What to tell it now. With more requests than frames none is guessed: frames are full without."""
        asks: list[Instruction] = []
        requests = list(active)
        if len(requests) <= limits.max_in_flight:
            asks += [_read(epoch, request) for request in self._unread]
            for request in requests:
                if _is_to_read(request, speculation):
                    asks.append(_read(epoch, request))
                elif (number := _num_to_ask(request, limits, speculation)) > 0:
                    asks.append(_ask(epoch, request, number))
                self._rest(request)
        self._unread.clear()
        ended, self._ended = self._ended, []
        return [*ended, *asks]

    def _rest(self, request: Request) -> None:
        """Where its pause has begun it is told so, once."""
        drafting = request.drafting
        if drafting is None or drafting.pay is None or drafting.foretold is None:
            return
        if drafting.pay.is_paused and drafting.foretold.is_wanted:
            drafting.foretold.rest()
            self._ended.append(EndDrafts(request.session, is_over=False))


def _is_to_read(request: Request, speculation: Speculation) -> bool:
    """Whether more is missing to it than it should read while a frame waits; then it reads, and none does."""
    drafting = request.drafting
    if drafting is None or (foretold := drafting.foretold) is None or drafting.pay is None:
        return False
    if not request.num_completion or foretold.is_reading:
        return False
    num_missed = request.num_known - foretold.num_given
    if drafting.pay.is_paused:
        return request.room >= NUM_TRIAL and speculation.try_draft(drafting, num_missed)
    return num_missed > READ_CHUNK_TOKENS


def _num_to_ask(request: Request, limits: Limits, speculation: Speculation) -> int:
    drafting = request.drafting
    if drafting is None or (foretold := drafting.foretold) is None or not request.num_completion:
        return 0
    if drafting.pay is None or drafting.pay.is_paused or foretold.is_reading:
        return 0
    if request.is_due and not foretold.ids:
        num_due = request.num_known - request.num_sent
        number = speculation.num_to_await(drafting, num_due, request.room)
        foretold.is_held = number > 0
        return 0 if foretold.is_awaited else number
    ahead = request.ahead
    is_under_way = request.live and not request.is_due
    if not limits.drafts_ahead or not is_under_way or foretold.ids[: len(ahead)] != ahead:
        return 0
    return speculation.num_to_ask_ahead(drafting, len(ahead), request.room)


def _ask(epoch: int, request: Request, num_drafts: int) -> Draft:
    assert request.drafting is not None
    foretold = request.drafting.foretold
    assert foretold is not None
    foretold.ask(num_drafts)
    for window in request.windows:
        window.is_beside_draft = True
    tokens = [*request.known(0, request.num_known), *foretold.ids]
    return Draft(epoch, request.session, tokens, num_drafts, request.sampling, len(request.prompt))


def _read(epoch: int, request: Request) -> Draft:
    """It reads what is known, while nobody waits for it."""
    assert request.drafting is not None
    foretold = request.drafting.foretold
    assert foretold is not None
    foretold.read()
    tokens = request.known(0, request.num_known)
    return Draft(epoch, request.session, tokens, 0, request.sampling, len(request.prompt))
