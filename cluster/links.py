"""Asks the nodes of a running ring to measure the links between them, one after another. One thread.

Each direction is measured by the node that would send: nodes may reach each other by other addresses than the
machine that asks, and a way there may be slower than the way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc

from cluster.call_trouble import call_trouble
from cluster.config import ClusterConfig, NodeConfig
from cluster.errors import EXIT_ERROR, EXIT_USAGE, UserError
from cluster.link_measurer import MAX_WAYS
from cluster.link_probe import LIMIT_S, why_no_connection
from cluster.rpc import connect
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc

ANSWER_S = 5.0
DIRECTION_LIMIT_S = MAX_WAYS * LIMIT_S + ANSWER_S


@dataclass(frozen=True, slots=True)
class Direction:
    """What one node measured of its ways to another one, the best first."""

    from_node: NodeConfig
    to_node: NodeConfig
    paths: tuple[control_pb2.LinkPath, ...] = ()
    failure: str = ""  # why nothing was measured at all

    @property
    def best(self) -> control_pb2.LinkPath | None:
        """The way that edges will use; None where none could be measured."""
        return self.paths[0] if self.paths and not self.paths[0].reason else None

    @property
    def reason(self) -> str:
        """Why it could not be measured, or an empty string."""
        if self.best is not None:
            return ""
        why = self.failure or "; ".join(path.reason for path in self.paths) or "no address is known"
        return f"{self.from_node.name} to {self.to_node.name}: {why}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A link in both directions."""

    there: Direction
    back: Direction

    @property
    def names(self) -> tuple[str, str]:
        return self.there.from_node.name, self.there.to_node.name

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset((self.there.from_node.rank, self.there.to_node.rank))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the pair could not be measured, a sentence for each direction that could not."""
        return tuple(direction.reason for direction in (self.there, self.back) if direction.reason)

    @property
    def latency_ms(self) -> float:
        """One way: half of the median round trip, of the slower direction; only without reasons."""
        return max(path.round_trip_p50_ms for path in self._best) / 2

    @property
    def bandwidth_gbit_s(self) -> float:
        """Of the slower direction; only without reasons."""
        return min(path.bandwidth_gbit_s for path in self._best)

    @property
    def wifi(self) -> control_pb2.LinkPath | None:
        """The way by Wi-Fi, if that is the best there is in one of the directions."""
        found = (d.best for d in (self.there, self.back))
        return next((path for path in found if path is not None and path.kind == "wifi"), None)

    @property
    def _best(self) -> list[control_pb2.LinkPath]:
        return [d.best for d in (self.there, self.back) if d.best is not None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """All pairs, and what the reachable nodes told of themselves by rank."""

    pairs: tuple[Pair, ...]
    profiles: Mapping[int, control_pb2.NodeProfile] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return not any(pair.reasons for pair in self.pairs)


def measure_links(
    config: ClusterConfig,
    credentials: Credentials | str | None,
    *,
    is_forced: bool,
    say: Callable[[str], None],
) -> Measurement:
    """Measure each pair of the config's used nodes, and tell `say` what is being done.

    Raises UserError where there is nothing to measure, and where requests are running unless `is_forced`.
    """
    nodes = [node for node in config.nodes if node.use]
    if len(nodes) < 2:
        raise UserError(f"{config.path} has one node: there is no link to measure", EXIT_USAGE)
    peers = [_Peer(config, node, credentials) for node in nodes]
    try:
        for peer in peers:
            say(f"asking {peer.node.name} at {peer.node.address}")
            peer.greet()
        if not is_forced:
            _refuse_busy(peers)
        pairs = []
        for a, b in itertools.combinations(peers, 2):
            pairs.append(Pair(a.measure(b, is_forced, say), b.measure(a, is_forced, say)))
        return Measurement(tuple(pairs), {p.node.rank: p.profile for p in peers if p.profile is not None})
    finally:
        for peer in peers:
            peer.close()


def _refuse_busy(peers: list[_Peer]) -> None:
    busy = [f"{peer.node.name} ({peer.num_sessions})" for peer in peers if peer.num_sessions]
    if busy:
        raise UserError(
            f"requests are running on {', '.join(busy)}, which a measurement would disturb; wait until they "
            "are done, or measure with --anyway",
            EXIT_ERROR,
        )


class _Peer:
    """A node that is asked."""

    def __init__(
        self, config: ClusterConfig, node: NodeConfig, credentials: Credentials | str | None
    ) -> None:
        self.node, self._digest, self._credentials = node, config.digest, credentials
        self._channel = connect(node.address, credentials, node.name)
        self._stub = control_pb2_grpc.ControlStub(self._channel)
        self.profile: control_pb2.NodeProfile | None = None
        self.num_sessions = 0
        self._trouble = ""  # why it cannot be asked

    def close(self) -> None:
        self._channel.close()

    def greet(self) -> None:
        """Ask what it is, and whether it works."""
        if reason := why_no_connection(self.node.address):
            self._trouble = reason
            return
        try:
            request = control_pb2.ProfileRequest(config_digest=self._digest)
            self.profile = self._stub.Profile(request, timeout=ANSWER_S)
            self.num_sessions = self._stub.Status(control_pb2.StatusRequest(), timeout=ANSWER_S).num_sessions
        except grpc.RpcError as error:
            self._trouble = self._explain(error)

    def measure(self, other: _Peer, is_forced: bool, say: Callable[[str], None]) -> Direction:
        """This node's ways to the other one."""
        if self._trouble:
            return Direction(self.node, other.node, failure=self._trouble)
        request = control_pb2.MeasureLinkRequest(
            to_address=other.node.address,
            to_rank=other.node.rank,
            told=[] if other.profile is None else other.profile.addresses,
            is_forced=is_forced,
        )
        paths: tuple[control_pb2.LinkPath, ...] = ()
        try:
            for report in self._stub.MeasureLink(request, timeout=DIRECTION_LIMIT_S):
                if report.activity:
                    say(report.activity)
                paths = tuple(report.paths)
        except grpc.RpcError as error:
            return Direction(self.node, other.node, failure=self._explain(error))
        return Direction(self.node, other.node, paths)

    def _explain(self, error: grpc.RpcError) -> str:
        assert isinstance(error, grpc.Call)
        if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED):
            return error.details() or f"{self.node.address} refused"
        return call_trouble(error, self.node, self._credentials)
