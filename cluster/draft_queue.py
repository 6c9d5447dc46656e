"""What the draft model still has to do: windows of guesses, a piece of each in turn. Compute thread only."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from cluster.drafter import DraftCall, Drafter, Guessing
from cluster.foretold import Drafted

logger = logging.getLogger(__name__)


OnDrafted = Callable[[Drafted], None]


@dataclass(frozen=True, slots=True)
class DraftWork:
    """Ask the draft model. `on_drafted` is called once, from the compute thread.

    Where it is only to read, that is when it has. What was asked before for the session is dropped and not
    answered.
    """

    epoch: int
    call: DraftCall
    on_drafted: OnDrafted


@dataclass(frozen=True, slots=True)
class DraftEnd:
    """No more guesses for this session: its request ended. Not is_over: it does without for a while."""

    session: int
    is_over: bool = True


class DraftQueue:
    """Pieces of work for one drafter. A piece is a chunk of 128 tokens, or a token: see `Guessing.step`."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self._waiting: OrderedDict[int, tuple[Guessing, OnDrafted]] = OrderedDict()
        self._asked = set[int]()  # sessions that will be asked again, as far as is known
        self.kv_bytes = 0  # of the drafter's caches when it was last noted; any thread may read it

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def is_in_use(self) -> bool:
        """It computes, or may have to at any time; else every answer does without it, for now at least."""
        return bool(self._asked)

    def add(self, work: DraftWork) -> None:
        """After those that wait, in place of an earlier one of its session."""
        session = work.call.session
        self._asked.add(session)
        self._waiting.pop(session, None)
        self._waiting[session] = self.drafter.begin(work.call), work.on_drafted

    def end(self, session: int) -> None:
        """Nobody waits for its guesses any more."""
        self.rest(session)
        self.drafter.close(session)

    def rest(self, session: int) -> None:
        """Nothing is done for it until it is asked again: what it has read stays, and does not grow."""
        self._asked.discard(session)
        self._waiting.pop(session, None)

    def clear(self) -> None:
        """A new epoch: nobody waits for anything."""
        self._waiting.clear()
        self._asked.clear()
        self.drafter.drop_all()
        self.note_bytes()

    def note_bytes(self) -> None:
        """What the caches hold now."""
        self.kv_bytes = self.drafter.kv_bytes

    def step(self) -> None:
        """One piece of the window that came first; those that only read on let others go before."""
        session, (guessing, on_drafted) = next(iter(self._waiting.items()))
        was_told, only_reads = guessing.ids is not None, not guessing.call.num_drafts
        began = time.perf_counter()
        try:
            is_more = guessing.step()
        except Exception:  # border: a guess that fails is none, and no request notices
            logger.exception("guessing for session %d failed", session)
            self.drafter.readings.drop(session)
            guessing.ids, is_more = guessing.ids or [], False
        guessing.own_s += time.perf_counter() - began
        if not is_more:
            del self._waiting[session]
        elif guessing.ids is not None:
            self._waiting.move_to_end(session)
        is_due = not is_more if only_reads else guessing.ids is not None and not was_told
        if is_due:
            answer = guessing.ids or []
            on_drafted(Drafted(len(guessing.call.tokens), answer, guessing.own_s * 1e3, guessing.num_read))


def hand_over(work: DraftWork | DraftEnd, drafts: DraftQueue | None, epoch: int) -> None:
    """To the queue; where there is none, or it works for another epoch, the answer is no guess."""
    if isinstance(work, DraftEnd):
        if drafts is not None:
            (drafts.end if work.is_over else drafts.rest)(work.session)
    elif drafts is None or work.epoch != epoch:
        work.on_drafted(Drafted(len(work.call.tokens), []))
    else:
        drafts.add(work)
