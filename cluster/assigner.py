"""Tells nodes which epoch and plan they are in, and never waits for one of them.

Everything is called by the coordinator's thread; replies come on gRPC's threads and wait in a queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import grpc

from cluster.membership import Member
from cluster.rpc import connect
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc

ASSIGN_AGAIN_S = 1.0
ASSIGN_TIMEOUT_S = 3.0


@dataclass(slots=True)
class Joined:
    """A rank that was told of the present epoch."""

    incarnation: int
    assigned_at: float
    is_accepted: bool = False
    reason: str = ""  # why it did not take it


@dataclass(frozen=True, slots=True)
class _Pending:
    call: grpc.Future[control_pb2.AssignReply]
    channel: grpc.Channel


class Assigner:
    """`joined`: by rank, how each took the present epoch. `on_reply()`: there is one to collect.

    `is_overtaken`: a node knows a later epoch of this head than the head itself. Somebody else assigned it.
    """

    def __init__(self, credentials: Credentials | str | None, on_reply: Callable[[], object]) -> None:
        self.joined: dict[int, Joined] = {}
        self.is_overtaken = False
        self._credentials, self._on_reply = credentials, on_reply
        self._pending: dict[int, _Pending] = {}
        self._ended: SimpleQueue[tuple[int, _Pending]] = SimpleQueue()

    def begin(self) -> None:
        """A new epoch: nobody has joined it, and what was asked before counts no longer."""
        pending, self._pending = list(self._pending.values()), {}
        for one in pending:
            one.call.cancel()
            one.channel.close()
        self.joined.clear()
        self.is_overtaken = False

    def has_joined(self, rank: int) -> bool:
        """Whether the rank took the present epoch."""
        joined = self.joined.get(rank)
        return joined is not None and joined.is_accepted

    def is_due(self, rank: int, now: float) -> bool:
        """Whether a rank that is not in the epoch should be asked now."""
        joined = self.joined.get(rank)
        return rank not in self._pending and (joined is None or now - joined.assigned_at > ASSIGN_AGAIN_S)

    def send(self, due: Iterable[Member], request: control_pb2.AssignRequest, now: float) -> None:
        """Ask each of `due`, which must be connected."""
        for member in due:
            assert member.status is not None
            accepted = self.has_joined(member.rank)
            self.joined[member.rank] = Joined(member.status.incarnation, now, accepted)
            channel = connect(member.address, self._credentials, member.node.name)
            call = control_pb2_grpc.ControlStub(channel).Assign.future(request, timeout=ASSIGN_TIMEOUT_S)
            self._pending[member.rank] = pending = _Pending(call, channel)
            call.add_done_callback(partial(self._take, member.rank, pending))

    def collect(self) -> None:
        """Take the replies that have come."""
        while True:
            try:
                rank, pending = self._ended.get_nowait()
            except Empty:
                return
            if self._pending.get(rank) is not pending:
                continue  # of an earlier epoch
            del self._pending[rank]
            pending.channel.close()
            try:
                reply = pending.call.result()
            except (grpc.RpcError, grpc.FutureCancelledError):
                continue  # the watcher says what is wrong with it
            joined = self.joined[rank]
            joined.is_accepted, joined.reason = reply.accepted, reply.reason
            self.is_overtaken |= reply.is_overtaken

    def _take(self, rank: int, pending: _Pending, _call: object) -> None:
        self._ended.put((rank, pending))
        self._on_reply()
