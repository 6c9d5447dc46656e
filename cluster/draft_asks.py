"""What the draft model is asked, for which request and when. Pure; guarded by the scheduler's lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.foretold import Foretold
from cluster.instructions import Draft, EndDrafts, Instruction
from cluster.request import Request
from cluster.room import Limits
from cluster.speculation import Speculation


@dataclass(slots=True)
class DraftAsks:
    """Prompts are given to it to read as they begin; guesses are such as a frame waits for, or such as may
    follow those on their way.
    """

    _unread: list[Request] = field(default_factory=list)  # their prompts have not been given to it
    _ended: list[int] = field(default_factory=list)  # sessions that it may forget

    def clear(self) -> None:
        """All requests are over, and it forgets them itself."""
        self._unread.clear()
        self._ended.clear()

    def admit(self, request: Request) -> None:
        """It begins."""
        if request.drafting is not None:
            request.drafting.foretold = Foretold(len(request.prompt))
            self._unread.append(request)

    def end(self, request: Request) -> None:
        """It ended, one way or another."""
        if request.drafting is not None and request.drafting.foretold is not None:
            self._ended.append(request.session)

    def tell(
        self,
        speculation: Speculation,
        request: Request | None,
        position: int,
        ids: Sequence[int],
        draft_ms: float,
    ) -> bool:
        """The draft model's answer; False where nobody waits for it."""
        foretold = None if request is None or request.drafting is None else request.drafting.foretold
        if foretold is None:
            return False
        was_held, num_asked = foretold.is_held, foretold.num_asked
        if not foretold.tell(position, ids):
            return False
        if was_held and draft_ms:
            speculation.learn_draft(min(len(ids) + 1, num_asked), draft_ms)
        return True

    def due(
        self, epoch: int, limits: Limits, active: Iterable[Request], speculation: Speculation
    ) -> list[Instruction]:
        """What to tell it now. With more requests than frames none is guessed: frames are full without."""
        asks: list[Instruction] = [EndDrafts(session) for session in self._ended]
        self._ended.clear()
        requests = list(active)
        if len(requests) <= limits.max_in_flight:
            for request in self._unread:
                prompt = request.prompt
                asks.append(Draft(epoch, request.session, prompt, 0, request.sampling, len(prompt)))
            asks += [
                _ask(epoch, request, number)
                for request in requests
                if (number := _num_to_ask(request, limits, speculation)) > 0
            ]
        self._unread.clear()
        return asks


def _num_to_ask(request: Request, limits: Limits, speculation: Speculation) -> int:
    drafting = request.drafting
    if drafting is None or (foretold := drafting.foretold) is None or not request.num_completion:
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
    tokens = [*request.known(0, request.num_known), *foretold.ids]
    return Draft(epoch, request.session, tokens, num_drafts, request.sampling, len(request.prompt))
