"""The head's view of the nodes: one watcher thread per rank keeps a stream of statuses open.

A node whose stream breaks is lost at once; one that is silent is lost after `silence_timeout_s`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import grpc

from cluster.call_trouble import Kind, connection_kind
from cluster.config import NodeConfig
from cluster.heartbeat import SILENCE_LIMIT_S, heartbeat
from cluster.log_book import LogBook
from cluster.rpc import connect
from cluster.tls import Credentials
from cluster.tls_trouble import handshake_trouble
from proto import control_pb2, control_pb2_grpc

BEAT_INTERVAL_MS = 250
RETRY_S = 0.3
_OF_THE_NETWORK = (Kind.NO_NAME, Kind.NO_ROUTE, Kind.NOT_ALLOWED)  # where starting the node does not help


class Reach(Enum):
    """How a node stands with the head."""

    WAITING = "waiting"  # never heard of
    CONNECTED = "connected"
    UNREACHABLE = "unreachable"
    FROZEN = "frozen"  # connected, but silent
    REFUSED = "refused"  # it answers, but does not belong here


@dataclass(slots=True)
class Member:
    """What the head knows of one rank. Written by its watcher, read by the coordinator."""

    rank: int
    node: NodeConfig
    reach: Reach = Reach.WAITING
    reason: str = ""
    profile: control_pb2.NodeProfile | None = None
    status: control_pb2.NodeStatus | None = None
    heard_at: float = 0.0  # time.monotonic()

    @property
    def address(self) -> str:
        return self.node.address

    @property
    def label(self) -> str:
        return f"rank {self.rank} ({self.node.name}, {self.node.address})"


class Watcher:
    """Keeps one member up to date until closed."""

    def __init__(
        self,
        node: NodeConfig,
        config_digest: str,
        incarnation: int,
        credentials: Credentials | str | None,
        on_change: Callable[[], None],
        *,
        logs: LogBook | None = None,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self._silence_limit_s = silence_limit_s
        self.member = Member(node.rank, node)
        self._logs = logs
        self._config_digest, self._incarnation, self._credentials = config_digest, incarnation, credentials
        self._on_change = on_change
        self._closed = threading.Event()
        self._silent_s = 0.0
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch-{node.rank}", daemon=True)

    def start(self) -> None:
        """Start the watcher thread; call once."""
        heartbeat.watch(self)
        self._thread.start()

    def leave(self) -> None:
        """Leave the stream; the thread ends soon."""
        self._closed.set()
        heartbeat.unwatch(self)
        self._cancel()

    def join(self, timeout_s: float = 0.5) -> None:
        """Wait for the thread after `leave`."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def tick(self, elapsed_s: float) -> None:
        """Timer thread: a silent node is cut off."""
        member = self.member
        self._silent_s += elapsed_s
        if member.reach is Reach.CONNECTED and self._silent_s >= self._silence_limit_s:
            self._set(
                Reach.FROZEN,
                f"{member.label} has been silent for {self._silence_limit_s:.1f} s; is it frozen?",
            )
            self._cancel()

    def _cancel(self) -> None:
        with self._lock:
            if self._call is not None:
                self._call.cancel()

    def _set(self, reach: Reach, reason: str = "") -> None:
        changed = (self.member.reach, self.member.reason) != (reach, reason)
        self.member.reach, self.member.reason = reach, reason
        if changed:
            self._on_change()

    def _run(self) -> None:
        while not self._closed.is_set():
            address, name = self.member.address, self.member.node.name
            channel = connect(address, self._credentials, name, silence_limit_s=self._silence_limit_s)
            try:
                self._watch(control_pb2_grpc.ControlStub(channel))
            except grpc.RpcError as error:
                if not self._closed.is_set() and not self._is_still_frozen(error):
                    self._set(*self._explain(error))
            finally:
                channel.close()
            self._closed.wait(RETRY_S)

    def _watch(self, stub: control_pb2_grpc.ControlStub) -> None:
        member = self.member
        profile = stub.Profile(control_pb2.ProfileRequest(config_digest=self._config_digest), timeout=1.0)
        if profile.config_digest != self._config_digest:
            self._set(
                Reach.REFUSED,
                f"{member.label} runs with another config (digest {profile.config_digest}, here "
                f"{self._config_digest}); copy the head's config there, give both the same --model, and "
                "restart it",
            )
            return
        member.profile = profile
        call = stub.Watch(
            control_pb2.WatchRequest(beat_interval_ms=BEAT_INTERVAL_MS, head_incarnation=self._incarnation)
        )
        with self._lock:
            self._call = call
        if self._closed.is_set():
            call.cancel()
        for status in call:
            if status.rank != member.rank:
                self._set(
                    Reach.REFUSED,
                    f"{member.address} answers as rank {status.rank}, not as rank {member.rank}; "
                    "start it with the --rank of its place in the config",
                )
                call.cancel()
                return
            self._silent_s = 0.0
            if status.logs:
                if self._logs is not None:
                    self._logs.take(member.rank, status.incarnation, status.logs)
                status.ClearField("logs")  # this status is told on, again and again
            previous, member.status, member.heard_at = member.status, status, time.monotonic()
            self._set(Reach.CONNECTED)
            if previous is None or _differs(previous, status):
                self._on_change()
        self._set(Reach.UNREACHABLE, f"{member.label} closed the connection")

    def _is_still_frozen(self, error: grpc.RpcError) -> bool:
        """A frozen process answers nothing, while its system still takes connections."""
        assert isinstance(error, grpc.Call)
        kind = connection_kind(error.details() or "")
        is_over = error.code() is grpc.StatusCode.UNAVAILABLE and kind not in (None, Kind.TIMED_OUT)
        return self.member.reach is Reach.FROZEN and not is_over

    def _explain(self, error: grpc.RpcError) -> tuple[Reach, str]:
        assert isinstance(error, grpc.Call)
        member, code = self.member, error.code()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return Reach.REFUSED, f"{member.label} has another token; give every node the same one"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Reach.REFUSED, f"{member.address} is not a macrame node; is another server on this port?"
        is_new = member.reach is not Reach.CONNECTED  # what stood is not broken by a certificate
        if is_new and code is grpc.StatusCode.UNAVAILABLE and (trouble := self._handshake_trouble(error)):
            return Reach.UNREACHABLE, trouble
        kind = connection_kind(error.details() or "") if code is grpc.StatusCode.UNAVAILABLE else None
        why = f": {kind.value}" if kind in _OF_THE_NETWORK else ""
        if member.reach is Reach.WAITING:
            return Reach.WAITING, f"{member.label} is not there yet{why}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Reach.UNREACHABLE, f"{member.label} does not answer"
        return Reach.UNREACHABLE, f"{member.label} is gone{why}"

    def _handshake_trouble(self, error: grpc.Call) -> str:
        member = self.member
        details = error.details() or ""
        return handshake_trouble(member.address, self._credentials, member.label, member.node.name, details)


def short_of_memory(members: Iterable[Member]) -> str:
    """Why the ring should start no new request now, in one sentence; empty where it may."""
    for member in members:
        status = member.status
        if status is not None and status.HasField("memory") and not status.memory.is_admitting:
            told = status.reason.removeprefix("memory: ")
            return f"{member.label} is short of memory ({told}); no new request starts there, try again later"
    return ""


def _differs(a: control_pb2.NodeStatus, b: control_pb2.NodeStatus) -> bool:
    return (a.state, a.epoch, a.incarnation, a.lost_edge, a.reason) != (
        b.state,
        b.epoch,
        b.incarnation,
        b.lost_edge,
        b.reason,
    )
