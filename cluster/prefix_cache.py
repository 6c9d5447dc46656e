"""What prompts begin with instead of being read again: the scheduler's part of it. Pure.

Which sessions are kept (kept.py), where prompts are copied (prompt_points.py), what must go for that, which
prompts begin with what a request that still runs has read, and which wait until it has (prompt_waits.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.counters import Counters
from cluster.kept import MIN_COMMON, Kept, KeptSessions
from cluster.outbox import Outbox
from cluster.prompt_points import RecentPrompts, points
from cluster.prompt_waits import find_read, find_wait
from cluster.request import Request
from cluster.rewind import kept_length
from cluster.room import Limits, fits_beside, too_much


@dataclass(slots=True)
class PrefixCache:
    """Of one scheduler, whose lock guards it."""

    _kept: KeptSessions = field(default_factory=KeptSessions)
    _recent: RecentPrompts = field(default_factory=RecentPrompts)
    # Kept no more: closed once nobody waits to begin with it, or there is no room to wait.
    _leaving: list[Kept] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """The ring broke: the stages keep nothing."""
        self._kept.clear()
        self._leaving.clear()

    def drop_all(self) -> None:
        """Nothing is to be kept: all that is leaves."""
        self._leaving += self._kept.clear()

    def begin(self, request: Request, limits: Limits, outbox: Outbox, active: Collection[Request]) -> None:
        """What a request that starts need not read, what it waits for, and where copies of it are made."""
        if limits.trim_window < 0 or request.reads_all:
            return
        self._begin_kept(request, limits, outbox.busy)
        if not limits.can_shorten(request.num_reserved):  # it may become one that cannot be shortened
            num_shared = self._recent.num_shared(request.prompt, request.adapter)
            request.points = points(len(request.prompt), request.num_cached, num_shared)
            self._recent.add(request.prompt, request.adapter)
        request.wait = find_wait(request, limits, active)

    def end_waits(
        self, by_session: Mapping[int, Request], limits: Limits, outbox: Outbox, counters: Counters
    ) -> None:
        """Those go on that waited for what another one was to read: that was sent, or the other has left."""
        for request in by_session.values():
            if request.wait is None:
                continue
            other = by_session.get(request.wait.session)
            if other is not None and other.num_sent < request.wait.num_tokens:
                continue
            is_there = other is not None and limits.can_shorten(other.num_reserved)
            before, num_read = request.num_cached, request.wait.num_tokens if is_there else 0
            self._begin_kept(request, limits, outbox.busy)
            counters.add_cached(before, request.num_cached)
            request.wait = find_wait(request, limits, by_session.values(), num_read)

    def _begin_kept(self, request: Request, limits: Limits, busy: Collection[int]) -> None:
        """It begins with the most that is kept, if that is more than what it would begin with.

        busy: sessions of which a frame is still in the ring.
        """
        match = self._kept.match(request.prompt, request.adapter, limits.trim_window, busy)
        if match is None or match[1] <= request.num_cached:
            return
        source, num_common = match
        request.from_session, request.began_beside = source.session, source.session in busy
        request.num_cached = request.num_sent = num_common
        if num_common == len(source.tokens) and not source.is_copy:
            self._forget(source.session)  # the new session goes on where it ended

    def begin_beside(self, request: Request, limits: Limits, active: Collection[Request]) -> int:
        """How many more tokens need not be read by a request whose first ones go now, since one that still
        runs has read them; 0: it does not begin as a copy of such a one.
        """
        if not request.can_begin_beside:
            return 0
        before = request.num_cached
        if (found := find_read(request, limits, active, before)) is None:
            return 0
        other, request.num_cached = found
        request.from_session, request.began_beside = other.session, True
        request.num_sent = request.num_cached
        return request.num_cached - before

    def copy(
        self, request: Request, position: int, limits: Limits, active: Collection[Request], number: int
    ) -> bool:
        """Whether session `number` is to be a copy of this one once so many tokens of its prompt are read.

        Older ones go for it.
        """
        if position not in request.points:
            return False
        tokens, share = request.prompt[:position], limits.share(position)
        if self._kept.has(tokens, request.adapter) or not fits_beside(limits, active, share):
            return False
        self.make_room(limits, active, share)
        self._kept.add(Kept(number, tokens, request.adapter, share, is_copy=True))
        return True

    def keep(self, request: Request, limits: Limits) -> int:
        """How many tokens of a request that ended stay; 0: it does not stay."""
        length = 0 if request.is_pooled else kept_length(request, limits)
        if limits.trim_window < 0 or length < MIN_COMMON:
            return 0
        tokens = request.known(0, length)
        self._kept.add(Kept(request.session, tokens, request.adapter, limits.share(length)))
        return length

    def make_room(self, limits: Limits, active: Collection[Request], share: float = 0.0) -> None:
        """What does not fit beside those that run, and one more of that share, leaves."""
        for session in too_much(limits, active, self._kept, share):
            self._forget(session)

    def distrust(self, sessions: Iterable[int]) -> None:
        """A stage failed on a frame of these: such as are kept may be missing there."""
        for session in sessions:
            if session in self._kept:
                self._forget(session)

    def let_go(self, active: Collection[Request], limits: Limits, counters: Counters) -> list[int]:
        """Those to close now: all that leave, but for such as one of `active` has yet to begin with.

        Where those that have begun need the room, those that wait do without it.
        """
        if not self._leaving:
            return []
        begun = [request for request in active if request.is_open]
        closes, staying = [], list[Kept]()
        for old in self._leaving:
            heirs = [r for r in active if not r.is_open and r.from_session == old.session]
            share = sum(kept.share for kept in (*staying, old)) + self._kept.share
            if heirs and fits_beside(limits, begun, share):
                staying.append(old)
                continue
            closes.append(old.session)
            for heir in heirs:
                counters.add_cached(heir.num_cached, 0)
                heir.from_session = heir.num_cached = heir.num_sent = 0
                heir.began_beside = False
        self._leaving = staying
        return closes

    def _forget(self, session: int) -> None:
        self._leaving.append(self._kept.remove(session))
