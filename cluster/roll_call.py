"""What the nodes' statuses say of the present epoch: what broke it, or what it still waits for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.assigner import Joined
from cluster.membership import Member, Reach
from planner.sizes import done_of
from proto import control_pb2


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why the ring cannot serve yet: one sentence per rank; is_loading: they all just need time."""

    reasons: tuple[str, ...]
    is_loading: bool

    def __str__(self) -> str:
        return "; ".join(self.reasons)


@dataclass(frozen=True, slots=True)
class RollCall:
    """One look at all ranks. needed: those without which nothing can be served."""

    epoch: int
    is_serving: bool
    needed: frozenset[int]
    members: Mapping[int, Member]
    joined: Mapping[int, Joined]
    stall_timeout_s: float

    def what_broke(self) -> str | None:
        """The first reason for another epoch."""
        for rank, joined in self.joined.items():
            if rank in self.needed and joined.is_accepted:
                reason = self._what_broke(self.members[rank], joined)
                if reason is not None:
                    return reason
        return None

    def _what_broke(self, member: Member, joined: Joined) -> str | None:
        if member.reach is not Reach.CONNECTED:
            return member.reason
        status = member.status
        assert status is not None
        if status.incarnation != joined.incarnation:
            return f"{member.label} was restarted"
        if status.epoch != self.epoch:
            if self.is_serving:  # it was seen in this epoch
                return f"{member.label} left the ring{status.reason and ': '}{status.reason}"
            return None  # an older status is still on its way
        if status.lost_edge:
            return f"{member.label} lost an edge: {status.lost_edge}"
        if self.is_serving and status.state == control_pb2.FAILED:
            return f"{member.label} failed: {status.reason}"
        if self.is_serving and (stall := self._stall(member)):
            return stall
        return None

    def failure_of(self, rank: int) -> str:
        """Why the rank's load failed in this epoch, or an empty string."""
        status = self.members[rank].status
        is_failed = status is not None and status.epoch == self.epoch and status.state == control_pb2.FAILED
        return status.reason if is_failed and status is not None else ""

    def failures(self) -> list[str]:
        """A sentence for each needed rank whose load failed in this epoch."""
        found = {rank: self.failure_of(rank) for rank in sorted(self.needed)}
        return [f"{self.members[rank].label} failed: {reason}" for rank, reason in found.items() if reason]

    def waiting(self) -> Waiting | None:
        """None where every needed rank is ready in this epoch."""
        reasons: list[str] = []
        is_loading = True
        for rank in sorted(self.needed):
            reason, only_time = self._waiting_for(rank)
            if reason:
                reasons.append(reason)
                is_loading &= only_time
        return Waiting(tuple(reasons), is_loading) if reasons else None

    def _waiting_for(self, rank: int) -> tuple[str, bool]:
        """A sentence, or an empty one where the rank is ready; and whether it only needs time."""
        member, joined = self.members[rank], self.joined.get(rank)
        status = member.status
        if member.reach is not Reach.CONNECTED or status is None:
            return member.reason or f"{member.label} is not there yet", False
        if joined is not None and joined.reason:
            return joined.reason, False
        is_here = status.epoch == self.epoch
        if is_here and status.state == control_pb2.FAILED:
            return f"{member.label} failed: {status.reason}", False
        if is_here and (stall := self._stall(member)):
            return stall, True
        if is_here and status.lost_edge:
            return f"{member.label} lost an edge: {status.lost_edge}", True
        is_ready = is_here and status.state == control_pb2.READY and joined is not None
        if (
            is_ready
            and joined is not None
            and joined.is_accepted
            and status.incarnation == joined.incarnation
        ):
            return "", True
        why = f": {status.reason}" if is_here and status.reason else ""
        return f"{member.label} is {_state_word(status)}{why}", True

    def _stall(self, member: Member) -> str:
        """What keeps the node's compute thread for too long, or an empty string."""
        status = member.status
        if status is None or status.busy_s <= self.stall_timeout_s:
            return ""
        return f"{member.label} has been {status.activity} for {status.busy_s:.0f} s without progress"


def _state_word(status: control_pb2.NodeStatus) -> str:
    word = control_pb2.NodeState.Name(status.state).lower()
    if status.state == control_pb2.LOADING and status.load_total_bytes:
        word = status.activity if status.activity == "fetching" else word
        return f"{word} ({done_of(status.loaded_bytes, status.load_total_bytes)})"
    return word
