"""What a node does when it is asked to measure its ways to another one, and whom it lets measure it.

gRPC handler threads. One measurement at a time leaves a node; what comes out is remembered for its edges.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc

from cluster.link_probe import LinkError, measure
from cluster.node import Node
from cluster.peer_links import Measured, Way, by_speed
from proto import control_pb2, ring_pb2

MAX_WAYS = 6  # that are measured to one node


class LinkMeasurer:
    """Measures for `node`, and answers for it where others measure."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()

    def accept(self, hello: ring_pb2.Hello) -> str | None:
        """Why another node may not measure its way here, in one sentence; None: it may."""
        node = self._node
        if hello.config_digest != node.config.digest:
            return (
                f"{node.name} runs with another config (digest {node.config.digest}, the caller's is "
                f"{hello.config_digest}); copy one config to every node"
            )
        if hello.to_rank != node.rank:
            return f"rank {node.rank} answers there, not rank {hello.to_rank}"
        return None if hello.is_forced else self._why_busy()

    def measure(
        self, request: control_pb2.MeasureLinkRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.LinkReport]:
        """A report before each way is measured; the last one has the results, the best way first."""
        if reason := self._refusal(request):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        if not self._lock.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._node.name} is measuring already; try again soon"
            )
        try:
            yield from self._measure(request, context)
        finally:
            self._lock.release()

    def _refusal(self, request: control_pb2.MeasureLinkRequest) -> str:
        node, nodes = self._node, self._node.config.nodes
        known = nodes[request.to_rank].address if request.to_rank < len(nodes) else "none"
        if request.to_rank == node.rank or request.to_address != known:
            return (
                f"{node.name} knows rank {request.to_rank} as {known}, not as {request.to_address}; copy the "
                "config that the ring runs with"
            )
        return "" if request.is_forced else self._why_busy() or ""

    def _why_busy(self) -> str | None:
        num_sessions = self._node.status().num_sessions
        if not num_sessions:
            return None
        return (
            f"{self._node.name} works on {num_sessions} requests, which a measurement would disturb; wait "
            "until they are done, or measure with --anyway"
        )

    def _measure(
        self, request: control_pb2.MeasureLinkRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.LinkReport]:
        node, rank = self._node, request.to_rank
        peer = node.config.nodes[rank]
        if request.told:
            node.links.tell(rank, request.told)
        try:
            ways = node.links.ways(rank)
        except OSError as error:
            reason = (
                f"the host name {peer.host!r} cannot be resolved on {node.name}: {error.strerror or error}"
            )
            yield control_pb2.LinkReport(paths=[control_pb2.LinkPath(reason=reason, kind="unknown")])
            return
        hello = ring_pb2.Hello(
            config_digest=node.config.digest, from_rank=node.rank, to_rank=rank, is_forced=request.is_forced
        )
        paths: dict[str, control_pb2.LinkPath] = {}
        for way in ways[:MAX_WAYS]:
            if not context.is_active() or node.is_closing:
                return
            yield control_pb2.LinkReport(activity=f"{node.name} measures its way to {peer.name} at {way.ip}")
            paths[way.ip] = self._measure_way(way, hello)
        measured = {ip: _result(path) for ip, path in paths.items()}
        node.links.remember(rank, measured)
        best_first = [paths[way.ip] for way in by_speed([w for w in ways if w.ip in paths], measured)]
        yield control_pb2.LinkReport(paths=best_first)

    def _measure_way(self, way: Way, hello: ring_pb2.Hello) -> control_pb2.LinkPath:
        path = control_pb2.LinkPath(
            ip=way.ip,
            local_ip=way.local_ip,
            interface=way.interface,
            peer_interface=way.peer_interface,
            kind=way.kind,
            mtu=way.mtu,
            speed_mbit_s=way.speed_mbit_s,
        )
        try:
            speed = measure(
                way.address, self._node.credentials, hello, peer=self._node.config.nodes[hello.to_rank].name
            )
        except LinkError as error:
            path.reason = str(error)
            return path
        path.round_trip_p50_ms, path.round_trip_p99_ms = speed.round_trip_p50_ms, speed.round_trip_p99_ms
        path.num_round_trips, path.num_bytes = speed.num_round_trips, speed.num_bytes
        path.bandwidth_gbit_s = speed.bandwidth_gbit_s
        return path


def _result(path: control_pb2.LinkPath) -> Measured | None:
    return None if path.reason else Measured(path.round_trip_p50_ms / 2, path.bandwidth_gbit_s)
