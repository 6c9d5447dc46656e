"""Which sessions of a stage are merged, changed only as frames ask for it. Compute thread only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from cluster.session import Group, Session
from shard_loader.shard import Shard
from shard_loader.state import ShardState


class Groups:
    """Gives each frame the caches of just its sessions: merged, taken apart and merged again as need be.

    A session that is closed leaves its group at `settle`.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._pending: list[mx.array] = []  # of sessions taken out: not evaluated yet
        self._left: list[Group] = []  # groups that have members which are closed

    def alone(self, session: Session) -> ShardState:
        """The session's caches by themselves."""
        if session.state is None:
            group = session.group
            assert group is not None
            self._keep(group, [member for member in group.members if member is not session])
        assert session.state is not None
        return session.state

    def together(self, sessions: Sequence[Session]) -> Group:
        """One group of exactly these sessions, in this order; at least two."""
        groups = list({id(s.group): s.group for s in sessions if s.group is not None}.values())
        if len(groups) == 1 and _same(groups[0].members, sessions):
            return groups[0]
        wanted = {id(session) for session in sessions}
        for group in groups:
            self._keep(group, [member for member in group.members if id(member) in wanted])
        lone = [session for session in sessions if session.group is None]
        if lone:
            states = [session.state for session in lone if session.state is not None]
            groups.append(Group(self._shard.merge(states), lone))
            for session in lone:
                session.state = None
        base = groups[0]
        for group in groups[1:]:
            base.state.extend(group.state)
            base.members, group.members = base.members + group.members, []
        if not _same(base.members, sessions):
            places = {id(member): i for i, member in enumerate(base.members)}
            base.state.keep([places[id(session)] for session in sessions])
            base.members = list(sessions)
        for session in sessions:
            session.group = base
        return base

    def copy(self, source: Session, into: Session, num_tokens: int) -> None:
        """`into` begins with the first tokens of `source`; both write to the same memory no more.

        A row stays in its group.
        """
        group = source.group
        if group is None:
            into.begin_like(source, self._shard.fork(self.alone(source), num_tokens))
            return
        row = self._shard.split(group.state, group.members.index(source))
        state = self._shard.fork(row, num_tokens)
        self._pending += state.arrays()
        into.begin_like(source, state)

    def drop(self, session: Session) -> None:
        """The session is closed, or its caches are spoilt."""
        session.is_closed, session.state = True, None
        if session.group is not None and session.group not in self._left:
            self._left.append(session.group)

    def settle(self) -> None:
        """After all closes of a frame: their rows leave, and nothing of them is held any longer."""
        for group in self._left:
            staying = [member for member in group.members if not member.is_closed]
            if len(staying) < len(group.members):
                self._keep(group, staying)
                self._pending += group.state.arrays() if staying else []
        self._left.clear()

    def take_pending(self) -> list[mx.array]:
        """What whoever evaluates next evaluates too; none twice."""
        pending, self._pending = self._pending, []
        return pending

    @staticmethod
    def nbytes(sessions: Iterable[Session]) -> int:
        """What their caches hold."""
        groups = {id(s.group): s.group for s in sessions if s.group is not None}
        alone = sum(s.state.nbytes for s in sessions if s.state is not None)
        return alone + sum(group.state.nbytes for group in groups.values())

    def _keep(self, group: Group, members: list[Session]) -> None:
        """The others, unless they are closed, become a group, or a session by itself."""
        if len(members) == len(group.members):
            return
        staying = {id(member) for member in members}
        leaving = [(row, member) for row, member in enumerate(group.members) if id(member) not in staying]
        for _, member in leaving:
            member.group = None
        alive = [(row, member) for row, member in leaving if not member.is_closed]
        if len(alive) == 1:
            row, member = alive[0]
            member.state = self._shard.split(group.state, row)
            self._pending += member.state.arrays()
        elif alive:
            other = Group(group.state.taken([row for row, _ in alive]), [member for _, member in alive])
            for member in other.members:
                member.group = other
            self._pending += other.state.arrays()
        if members:
            group.state.keep([row for row, member in enumerate(group.members) if id(member) in staying])
        group.members = members


def _same(members: Sequence[Session], sessions: Sequence[Session]) -> bool:
    return len(members) == len(sessions) and all(a is b for a, b in zip(members, sessions, strict=True))
