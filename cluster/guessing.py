"""Which guesses go with whose frames: the text's at once, the draft model's when it has answered. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cluster.draft_asks import DraftAsks
from cluster.foretold import Drafted
from cluster.instructions import Instruction
from cluster.ngrams import NO_GUESS, Guess, NGrams
from cluster.request import Request
from cluster.rewind import can_forget, may_go_ahead, position_after
from cluster.room import Limits
from cluster.speculation import Drafting, Speculation, Window
from shard_loader.reach import Reach


@dataclass(slots=True)
class Guessing:
    """Of one scheduler, whose lock guards it."""

    speculation: Speculation = field(default_factory=Speculation)
    _drafts: DraftAsks = field(default_factory=DraftAsks)

    def ring_up(self, limits: Limits) -> None:
        """What the ring can take back decides what may be guessed."""
        self.speculation.max_drafts = limits.max_drafts if limits.reach > Reach.NONE else 0
        self.speculation.is_reread = limits.reach == Reach.MARK
        self.speculation.has_ngrams = limits.has_ngrams

    def clear(self) -> None:
        """The ring broke."""
        self._drafts.clear()

    def begin(self, request: Request, limits: Limits) -> None:
        """A request starts. One that asks for log-probabilities gets them token by token."""
        is_plain = not (request.sampling.logprobs or request.is_scored or request.is_pooled)
        if not self.speculation.max_drafts or not is_plain:
            return
        request.drafting = Drafting(NGrams(request.prompt))
        if limits.has_drafter:
            self._drafts.admit(request, self.speculation)

    def end(self, request: Request) -> None:
        """A request that had begun ends."""
        self._drafts.end(request)

    def told(self, request: Request | None, drafted: Drafted, draft_ms: float) -> bool:
        """The draft model's answer; False where nobody waits for it."""
        return self._drafts.tell(self.speculation, request, drafted, draft_ms)

    def asks(self, active: Collection[Request], limits: Limits, epoch: int) -> list[Instruction]:
        """What the draft model is told now."""
        return self._drafts.due(epoch, limits, active, self.speculation)

    def learn(
        self,
        request: Request,
        window: Window,
        ids: Sequence[int],
        after: Window | None,
        trip_ms: float,
        *,
        now_ms: float,
    ) -> None:
        """From `ids`, drawn after a window's tokens `trip_ms` after it was sent; 0: not measured.

        now_ms: 0 where the ring had others to serve, too.
        """
        drafting = request.drafting
        is_beside = window.is_beside_draft or (drafting is not None and drafting.is_read_for)
        if window.is_alone and trip_ms and (len(window.tokens) > 1 or not is_beside):
            self.speculation.trips.add(len(window.tokens), trip_ms)
        if drafting is not None:
            self.speculation.judge(drafting, window, ids, after)
            self._drafts.judge(self.speculation, request, window, len(ids), now_ms)

    def judged(
        self, request: Request, window: Window, ids: Sequence[int], after: Window | None, limits: Limits
    ) -> None:
        """The answer goes on with `ids`, drawn after a window's tokens; after: the window that follows it."""
        if request.drafting is not None:
            request.drafting.extend(ids)
        is_whole = len(ids) == window.num_draws
        if after is not None and is_whole and after.tokens[0] == ids[-1]:
            after.is_ahead = False  # what it begins with is known now
            return
        for wrong in request.windows:
            wrong.is_void = True
        if after is not None or not is_whole:
            request.num_sent = position_after(request, window, limits.reach)

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
            if guess.tokens and can_forget(limits, request.num_sent + len(guess.tokens)):
                return request, guess
        return None


def is_roomy(active: Collection[Request], limits: Limits) -> bool:
    """There are frames enough for each request to have one of its own: none waits for a guess."""
    return len(active) <= limits.max_in_flight
