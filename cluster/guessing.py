"""Which guesses go with whose frames: the text's at once, the draft model's when it has answered. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cluster.foretold import Foretold
from cluster.instructions import Draft, EndDrafts, Instruction
from cluster.ngrams import NO_GUESS, Guess, NGrams
from cluster.request import Request
from cluster.rewind import may_go_ahead, position_after
from cluster.room import Limits
from cluster.speculation import Drafting, Speculation, Window
from shard_loader.reach import Reach


@dataclass(slots=True)
class Guessing:
    """Of one scheduler, whose lock guards it."""

    speculation: Speculation = field(default_factory=Speculation)
    _unread: list[Request] = field(default_factory=list)  # whose prompts the draft model has not been given
    _undrafted: list[int] = field(default_factory=list)  # ended sessions that the draft model may forget

    def ring_up(self, limits: Limits) -> None:
        """What the ring can take back decides what may be guessed."""
        self.speculation.max_drafts = limits.max_drafts if limits.reach > Reach.NONE else 0
        self.speculation.is_reread = limits.reach == Reach.MARK
        self.speculation.has_ngrams = limits.has_ngrams

    def clear(self) -> None:
        """The ring broke."""
        self._unread.clear()
        self._undrafted.clear()

    def begin(self, request: Request, limits: Limits) -> None:
        """A request starts. One that asks for log-probabilities gets them token by token."""
        if not self.speculation.max_drafts or request.sampling.logprobs:
            return
        foretold = Foretold(len(request.prompt)) if limits.has_drafter else None
        request.drafting = Drafting(NGrams(request.prompt), foretold=foretold)
        if foretold is not None:
            self._unread.append(request)

    def end(self, request: Request) -> None:
        """A request that had begun ends."""
        if request.drafting is not None and request.drafting.foretold is not None:
            self._undrafted.append(request.session)

    def told(self, request: Request | None, position: int, ids: Sequence[int], draft_ms: float) -> bool:
        """The draft model's answer; False where nobody waits for it."""
        foretold = None if request is None or request.drafting is None else request.drafting.foretold
        if foretold is None:
            return False
        was_held, num_asked = foretold.is_held, foretold.num_asked
        if not foretold.tell(position, ids):
            return False
        if was_held and draft_ms:
            self.speculation.learn_draft(min(len(ids) + 1, num_asked), draft_ms)
        return True

    def judged(
        self, request: Request, window: Window, ids: Sequence[int], after: Window | None, limits: Limits
    ) -> None:
        """The answer goes on with `ids`, drawn after a window's tokens; after: the window that follows it."""
        drafting = request.drafting
        if drafting is not None:
            drafting.text.extend(ids)
            if drafting.foretold is not None:
                drafting.foretold.extend(ids)
        is_whole = len(ids) == window.num_draws
        if after is not None and is_whole and after.tokens[0] == ids[-1]:
            after.is_ahead = False  # what it begins with is known now
            return
        for wrong in request.windows:
            wrong.is_void = True
        if after is not None or not is_whole:
            request.num_sent = position_after(request, window, limits.reach)

    def asks_first(self, active: Collection[Request], limits: Limits, epoch: int) -> list[Instruction]:
        """What the draft model has to know of requests that ended and began, and `asks`."""
        asks: list[Instruction] = [EndDrafts(session) for session in self._undrafted]
        self._undrafted.clear()
        for request in self._unread if is_roomy(active, limits) else ():
            prompt = request.prompt
            asks.append(Draft(epoch, request.session, prompt, 0, request.sampling, len(prompt)))
        self._unread.clear()
        return asks + self.asks(active, limits, epoch)

    def asks(self, active: Collection[Request], limits: Limits, epoch: int) -> list[Instruction]:
        """What the draft model is to guess: what a frame waits for, or what may follow those on their way."""
        if not limits.has_drafter or not is_roomy(active, limits):
            return []
        asks: list[Instruction] = []
        for request in active:
            drafting = request.drafting
            if drafting is None or (foretold := drafting.foretold) is None or not request.num_completion:
                continue
            if request.is_due and not foretold.ids:
                foretold.is_held = foretold.is_awaited
                if foretold.is_held:
                    continue
                num_due = request.num_known - request.num_sent
                number = self.speculation.num_to_await(drafting, num_due, request.room)
                foretold.is_held = number > 0
            elif limits.drafts_ahead and request.live and not request.is_due:
                ahead = request.ahead
                if foretold.ids[: len(ahead)] != ahead:
                    continue
                number = self.speculation.num_to_ask_ahead(drafting, len(ahead), request.room)
            else:
                continue
            if number > 0:
                foretold.ask(number)
                tokens = [*request.known(0, request.num_known), *foretold.ids]
                num_prompt = len(request.prompt)
                asks.append(Draft(epoch, request.session, tokens, number, request.sampling, num_prompt))
        return asks

    def behind(self, request: Request, active: Collection[Request], limits: Limits) -> Guess:
        """What goes along behind the known tokens of a request that are due."""
        if request.drafting is None or not is_roomy(active, limits):
            return NO_GUESS
        return self.speculation.guess(request.drafting, request.num_known - request.num_sent, request.room)

    def ahead(self, active: Collection[Request], limits: Limits) -> tuple[Request, Guess] | None:
        """Guesses that follow those whose verdict is not back, where a frame would else not be used."""
        if not is_roomy(active, limits):
            return None
        for request in active:
            if request.drafting is None or not may_go_ahead(request, limits):
                continue
            guess = self.speculation.guess_ahead(request.drafting, request.live, request.ahead, request.room)
            num_after = request.num_sent + len(guess.tokens)
            if guess.tokens and (limits.reach == Reach.ANY or num_after < limits.trim_window):
                return request, guess
        return None


def is_roomy(active: Collection[Request], limits: Limits) -> bool:
    """There are frames enough for each request to have one of its own: none waits for a guess."""
    return len(active) <= limits.max_in_flight
