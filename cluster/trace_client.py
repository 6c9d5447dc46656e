"""Asks the nodes of a running ring to trace themselves, keeps that up, and fetches what they recorded.

The main thread switches and pulls; a pool's threads ask all nodes at once, and one thread renews the leases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from cluster.call_trouble import call_trouble
from cluster.config import NodeConfig
from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError
from cluster.rpc import connect
from cluster.tls import Credentials
from cluster.trace_clock import Clock, Exchange, Moment
from cluster.trace_recorder import Kind, Record
from proto import control_pb2_grpc, trace_pb2

LEASE_S = 8.0
RENEW_S = 2.0
ANSWER_S = 2.0
PULL_S = 30.0
WAIT_S = 0.05  # between two tries
NUM_EXCHANGES = 24  # in a row, at the beginning and at the end


@dataclass(frozen=True, slots=True)
class Choices:
    """What is traced."""

    layers_per_span: int = 0
    has_memory: bool = False


@dataclass(slots=True)
class NodeTrace:
    """What one node recorded, by its own clock. trouble: why that is not all; empty: it is."""

    rank: int
    name: str
    records: list[Record] = field(default_factory=list)
    num_dropped: int = 0
    clock: Clock | None = None
    trouble: str = ""


def troubles(nodes: Sequence[NodeTrace]) -> list[str]:
    """Why a trace of these is not whole, a sentence each."""
    told = [f"{node.name}: {node.trouble}" for node in nodes if node.trouble]
    for node in nodes:
        if node.num_dropped:
            lost = f"the earliest {node.num_dropped} records are lost"
            told.append(f"{node.name} recorded more than it keeps: {lost}")
    return told


class Tracing:
    """A trace of these nodes from `start` to `stop`."""

    def __init__(
        self,
        nodes: Sequence[NodeConfig],
        credentials: Credentials | str | None,
        trace_id: str,
        choices: Choices,
    ) -> None:
        self._peers = [_Peer(node, credentials, trace_id, choices) for node in nodes]
        self._pool = ThreadPoolExecutor(len(nodes), thread_name_prefix="ThreadPoolExecutor-trace")
        self._stopping = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="trace-lease", daemon=True)

    def start(self, wait_s: float = 0.0) -> None:
        """All nodes record from now on. Raises UserError where one does not, and then none does.

        wait_s: nodes that are not there yet are asked again for so long.
        """
        deadline = time.monotonic() + wait_s
        self._all(lambda peer: peer.begin(deadline))
        self._compare()
        failed = next((peer for peer in self._peers if peer.trouble), None)
        if failed is not None:
            self._all(_Peer.end)
            self._close()
            code = EXIT_ERROR if failed.is_there else EXIT_UNREACHABLE
            raise UserError(f"{failed.node.name} cannot be traced: {failed.trouble}", code)
        self._renewing.start()

    def abandon(self) -> None:
        """Whoever still waits for a node in `start`, on another thread, waits no more. Any thread."""
        for peer in self._peers:
            peer.is_abandoned.set()

    def stop(self) -> list[NodeTrace]:
        """No node records any more; what each had recorded, as far as it still answers."""
        self._stopping.set()
        self._renewing.join()
        self._compare()
        self._all(_Peer.end)
        self._all(_Peer.pull)
        self._close()
        return [peer.told() for peer in self._peers]

    def _compare(self) -> None:
        """Clocks, one node after another: asked at once they would wait for each other."""
        for peer in self._peers:
            peer.compare()

    def _renew(self) -> None:
        while not self._stopping.wait(RENEW_S):
            self._all(_Peer.renew)

    def _all(self, what: Callable[[_Peer], None]) -> None:
        list(self._pool.map(what, self._peers))

    def _close(self) -> None:
        self._pool.shutdown()
        for peer in self._peers:
            peer.close()


class _Peer:
    """One node. Its own thread of the pool calls in, one at a time."""

    def __init__(
        self, node: NodeConfig, credentials: Credentials | str | None, trace_id: str, choices: Choices
    ) -> None:
        self.node = node
        self._credentials = credentials
        self._connect()
        self._on = trace_pb2.TraceRequest(
            id=trace_id,
            lease_s=LEASE_S,
            layers_per_span=choices.layers_per_span,
            has_memory=choices.has_memory,
        )
        self._off = trace_pb2.TraceRequest(id=trace_id)
        self._incarnation = 0
        self._moments: list[Moment] = []  # of its clock
        self._records: list[Record] = []
        self._num_dropped = 0
        self.trouble = ""
        self.is_there = False  # it has answered
        self._has_ended = False  # and said that it records no more
        self.is_abandoned = threading.Event()

    def begin(self, deadline: float) -> None:
        """Switch it on. Until `deadline` it may not be there yet."""
        while True:
            self.trouble = ""
            self._exchange(self._on, 1)
            if not self.trouble or self.is_there or time.monotonic() > deadline:
                return
            if self.is_abandoned.wait(WAIT_S):
                return
            self.close()
            self._connect()  # a channel that failed would wait longer each time

    def compare(self) -> None:
        """Read its clock, many times in a row."""
        if not self.trouble and (exchanges := self._exchange(self._on, NUM_EXCHANGES)):
            self._moments.append(Moment.of(exchanges))

    def renew(self) -> None:
        """One more lease."""
        if not self.trouble:
            self._exchange(self._on, 1)

    def end(self) -> None:
        """Switch it off, also where it was in trouble before: it may be back."""
        if self.is_there:
            self._has_ended = bool(self._exchange(self._off, 1))

    def pull(self) -> None:
        """Fetch what it recorded."""
        if not self._has_ended:
            return
        try:
            for chunk in self._stub.PullTrace(trace_pb2.PullTraceRequest(id=self._on.id), timeout=PULL_S):
                self._num_dropped += chunk.num_dropped
                self._records.extend(map(from_message, chunk.records))
        except grpc.RpcError as error:
            self.trouble = self.trouble or self._why(error)
        except ValueError:  # a kind of record that is not known here
            told = "it records more than this macrame knows; install the same version on every node"
            self.trouble = self.trouble or told

    def told(self) -> NodeTrace:
        """All that is known of it."""
        moments = self._moments
        clock = Clock(moments[0], moments[-1] if len(moments) > 1 else None) if moments else None
        node = self.node
        return NodeTrace(node.rank, node.name, self._records, self._num_dropped, clock, self.trouble)

    def close(self) -> None:
        """The connection ends."""
        self._channel.close()

    def _connect(self) -> None:
        self._channel = connect(self.node.address, self._credentials, self.node.name)
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def _exchange(self, request: trace_pb2.TraceRequest, count: int) -> list[Exchange]:
        exchanges: list[Exchange] = []
        for _ in range(count):
            sent = time.perf_counter()
            try:
                reply = self._stub.Trace(request, timeout=ANSWER_S)
            except grpc.RpcError as error:
                self.trouble = self.trouble or self._why(error)
                break
            answered = time.perf_counter()
            self.is_there = True
            if self._incarnation and reply.incarnation != self._incarnation:
                self.trouble = f"{self.node.name} was started again meanwhile"
                break
            self._incarnation = reply.incarnation
            if reply.reason:
                self.trouble = reply.reason
                break
            exchanges.append(Exchange(sent, reply.received_ns / 1e9, reply.sent_ns / 1e9, answered))
        return exchanges

    def _why(self, error: grpc.RpcError) -> str:
        assert isinstance(error, grpc.Call)
        if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED):
            return error.details() or "it refuses"
        return call_trouble(error, self.node, self._credentials)


def from_message(message: trace_pb2.TraceRecord) -> Record:
    """As the node recorded it. Raises ValueError for a kind that this version does not know."""
    return Record(
        Kind(message.kind),
        message.seq,
        message.began_ns / 1e9,
        message.ended_ns / 1e9,
        message.peer,
        tuple(message.numbers),
        message.text,
    )
