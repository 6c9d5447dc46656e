"""Steps that are built before their frames come: whose, and what is left to do. Compute thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.handed_over import HandedOver
from cluster.row_draws import RowDraws
from cluster.session import Session
from proto import ring_pb2
from shard_loader.ahead import Ahead, Kind
from shard_loader.batch_state import BatchState
from shard_loader.state import ShardState


@dataclass(frozen=True, slots=True)
class Team:
    """Sessions that took a step together, and what came in for it."""

    sessions: tuple[Session, ...]
    carry: Kind
    structure: str
    is_sampled: bool  # a token was drawn

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(session.spec.session for session in self.sessions)

    def goes_on_with(self, slots: Sequence[ring_pb2.Slot]) -> bool:
        """Whether these slots of its sessions are one more token each; not so after guesses, or with some."""
        return all(
            len(slot.tokens) == 1 and slot.position == session.position
            for session, slot in zip(self.sessions, slots, strict=True)
        )

    def state(self) -> ShardState | BatchState | None:
        """The state with just these sessions as it is, or None where they are not together now."""
        first, *others = self.sessions
        if any(session.is_closed for session in self.sessions):
            return None
        if not others:
            return first.state
        group = first.group
        if group is None or len(group.members) != len(self.sessions):
            return None
        is_same = all(a is b for a, b in zip(group.members, self.sessions, strict=True))
        return group.state if is_same else None


@dataclass(frozen=True, slots=True)
class Built:
    """A step that is built and waits for its numbers. draws: on the last stage, where no history is read."""

    team: Team
    state: ShardState | BatchState
    ahead: Ahead
    draws: RowDraws | None
    handed_over: HandedOver | None
    took_s: float  # building it
    since: float  # perf_counter() when it was ready


@dataclass(frozen=True, slots=True)
class Taken:
    """The step of a frame, as the plain path would have built it. handed_over: see `was_in_time`."""

    state: ShardState | BatchState
    out: Any
    draws: RowDraws | None
    handed_over: HandedOver | None
