"""The sessions of a stage: opened, copied, kept and closed as frames say. Compute thread only."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

import mlx.core as mx

from cluster.groups import Groups
from cluster.guide import Guides
from cluster.guide_process import GuideProcess
from cluster.session import Session
from proto import ring_pb2
from shard_loader.adapters import Adapters
from shard_loader.batch_state import BatchState
from shard_loader.shard import Shard
from shard_loader.state import ShardState

logger = logging.getLogger(__name__)


class OpenSessions:
    """By number, with the groups in which their caches are merged."""

    def __init__(self, shard: Shard, adapters: Adapters, guides: Guides | GuideProcess | None) -> None:
        self._shard, self._adapters, self._guides = shard, adapters, guides
        self.by_number: dict[int, Session] = {}
        self._kept: set[int] = set()  # of these, those that write no more
        # Once their frames, which wait, have run:
        self._late: list[int] = []  # to be closed
        self._late_keeps: dict[int, int] = {}  # to be kept, with so many tokens
        self.groups = Groups(shard)

    @property
    def num_running(self) -> int:
        """Of requests that run; any thread."""
        return len(self.by_number) - len(self._kept)

    @property
    def nbytes(self) -> int:
        """What their caches hold."""
        return Groups.nbytes(self.by_number.values())

    def clear(self) -> None:
        """A new epoch: all of the old one end."""
        for session in self.by_number.values():
            logger.info("session %d ends with its epoch", session.spec.session, extra=about(session))
        self.by_number.clear()
        self._kept.clear()
        self._late.clear()
        self._late_keeps.clear()
        self.groups = Groups(self._shard)

    def begin(self, frame: ring_pb2.Frame, waiting: Collection[int] = ()) -> dict[int, str]:
        """What a frame ends and begins; why some could not be opened, by number.

        waiting: sessions of frames that wait for something; they are kept or closed afterwards.
        """
        # Before the opens: one may begin as a copy of what it is then.
        self._keep_all(dict(zip(frame.keeps, frame.keep_tokens, strict=True)), waiting)
        failed = self._open_all(frame.opens)  # before the closes: it may begin as a copy of what is closed
        self._close_all(frame.closes, waiting)
        if frame.closes:
            self.groups.settle()
            if not frame.slots:
                mx.eval(self.groups.take_pending())
        return failed

    @property
    def late(self) -> frozenset[int]:
        """To be closed or kept by `close_late`."""
        return frozenset(self._late).union(self._late_keeps)

    def close_late(self, waiting: Collection[int]) -> None:
        """A frame that waited has run."""
        if self._late_keeps:
            keeps, self._late_keeps = self._late_keeps, {}
            self._keep_all(keeps, waiting)
        if self._late:
            late, self._late = self._late, []
            self._close_all(late, waiting)

    def _keep_all(self, keeps: Mapping[int, int], waiting: Collection[int]) -> None:
        for number, num_tokens in keeps.items():
            if number in waiting:
                self._late_keeps[number] = num_tokens  # it has yet to read what it is to forget
            else:
                self._keep(number, num_tokens)

    def _close_all(self, numbers: Iterable[int], waiting: Collection[int]) -> None:
        for number in numbers:
            if number in waiting:
                self._late.append(number)  # others share the frame that waits with it
            else:
                self._close(number)

    def _open_all(self, specs: Sequence[ring_pb2.SessionSpec]) -> dict[int, str]:
        failed: dict[int, str] = {}
        for spec in specs:
            try:
                self._adapters.check(spec.adapter)
                session = Session.open(spec, self._shard, self._guides)
                if spec.from_session:
                    self._begin_like(session, spec.from_session, spec.from_tokens)
                self.by_number[spec.session] = session
                logger.info(
                    "session %d opened: %d tokens of prompt%s, %d of answer at most",
                    *(spec.session, spec.prompt_tokens, _known(spec), spec.max_tokens),
                    extra=about(session),
                )
            except (ValueError, LookupError) as error:
                failed[spec.session] = str(error)
        return failed

    def _begin_like(self, session: Session, number: int, num_tokens: int) -> None:
        source = self.by_number.get(number)
        if source is None:
            raise LookupError(f"session {number} is not open on this stage, and has no copy")
        self.groups.copy(source, session, num_tokens)

    def _keep(self, number: int, num_tokens: int) -> None:
        """The session writes no more: its caches leave the group, whose padding they need not have."""
        session = self.by_number.get(number)
        if session is not None:
            self._kept.add(number)
            session.rewind(self.groups.alone(session), num_tokens)
            mx.eval(self.groups.take_pending())
            logger.info("session %d kept at position %d", number, session.position, extra=about(session))

    def fork(self, fork: ring_pb2.Fork) -> None:
        """What the session has come to is kept as another one, which shares its memory until it goes on."""
        source = self.by_number[fork.from_session]
        spec = ring_pb2.SessionSpec(session=fork.session, request_id=source.spec.request_id)
        copy = Session(spec, None)
        self.groups.copy(source, copy, source.position)
        self.by_number[fork.session] = copy
        self._kept.add(fork.session)
        logger.info(
            "session %d kept: a copy of %d at position %d",
            *(fork.session, fork.from_session, source.position),
            extra=about(source),
        )

    def _close(self, number: int) -> None:
        session = self.by_number.pop(number, None)
        self._kept.discard(number)
        if session is not None:
            logger.info("session %d closed at position %d", number, session.position, extra=about(session))
            self.groups.drop(session)

    def leave(self, empty: Iterable[Session]) -> None:
        """Rows that only kept a place leave with the next ones that do."""
        for session in empty:
            self.groups.drop(session)

    def state(self, sessions: Sequence[Session]) -> ShardState | BatchState:
        """The caches of just these sessions."""
        return self.groups.alone(sessions[0]) if len(sessions) == 1 else self.groups.together(sessions).state


def about(session: Session | None) -> dict[str, object]:
    """As `extra`: whose request the line is about."""
    return {} if session is None else {"request_id": session.spec.request_id}


def _known(spec: ring_pb2.SessionSpec) -> str:
    return f" ({spec.from_tokens} of session {spec.from_session}'s)" if spec.from_session else ""
