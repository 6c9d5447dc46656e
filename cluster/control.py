"""The control service of every node: an RPC border over Node. gRPC handler threads."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator, Sequence

import grpc

from cluster.diagnosis_service import DiagnosisService
from cluster.kept_models import kept_models
from cluster.kernel_times import kept_times, told_times
from cluster.lan_copy import CopyService
from cluster.link_measurer import LinkMeasurer
from cluster.measured_speeds import told_speeds
from cluster.node import Node
from cluster.trace_service import TraceService
from cluster.versions import macrame_version, mlx_lm_version, mlx_version
from planner.node_profile import NodeProfile
from proto import control_pb2, control_pb2_grpc, trace_pb2

MAX_WATCHERS = 16  # heads, and as many others: each holds a worker, and edges need those
HEAD_GONE_S = 2.0  # without a watching head for so long, a node frees its sessions


class ControlService(control_pb2_grpc.ControlServicer):
    """Answers the head; `profile` is what this machine measured of itself, `addresses` its own."""

    def __init__(
        self, node: Node, profile: NodeProfile, addresses: Sequence[control_pb2.NodeAddress] = ()
    ) -> None:
        self._node, self._profile, self._addresses = node, profile, addresses
        self.measurer = LinkMeasurer(node)
        self._copies = CopyService(node.config.model)
        self._diagnoses = DiagnosisService(node)
        self._trace = TraceService(node)
        self._lock = threading.Lock()
        self._num_heads = 0
        self._watchers = {is_head: threading.BoundedSemaphore(MAX_WATCHERS) for is_head in (True, False)}
        self._gone_timer: threading.Timer | None = None
        self._is_closed = False

    def close(self) -> None:
        """No timer outlives the service."""
        with self._lock:
            self._is_closed = True
            if self._gone_timer is not None:
                self._gone_timer.cancel()

    def Profile(  # noqa: N802
        self, request: control_pb2.ProfileRequest, context: grpc.ServicerContext
    ) -> control_pb2.NodeProfile:
        """What this machine is."""
        node, profile = self._node, self._profile
        times = kept_times(profile, node.config.nodes[node.rank].device)  # anew: tests go on while it runs
        return control_pb2.NodeProfile(
            name=node.name,
            chip=profile.chip or "",
            gpu_cores=profile.gpu_cores or 0,
            memory_bytes=profile.memory_bytes,
            ceiling_bytes=profile.ceiling_bytes,
            available_bytes=profile.available_bytes or 0,
            device=profile.device,
            mlx_version=mlx_version(),
            mlx_lm_version=mlx_lm_version(),
            macrame_version=macrame_version(),
            config_digest=node.config.digest,
            platform=platform.platform(),
            speeds=told_speeds(profile),
            forms=told_times(times),
            addresses=self._addresses,
        )

    def Assign(  # noqa: N802
        self, request: control_pb2.AssignRequest, context: grpc.ServicerContext
    ) -> control_pb2.AssignReply:
        """Take a plan; returns at once."""
        try:
            return self._node.assign(request)
        except ValueError as error:
            return control_pb2.AssignReply(reason=f"the plan cannot be read: {error}")

    def Status(  # noqa: N802
        self, request: control_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> control_pb2.NodeStatus:
        """One status."""
        return self._node.status()

    def Watch(  # noqa: N802
        self, request: control_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.NodeStatus]:
        """Statuses until the caller leaves or this node closes; to MAX_WATCHERS at once."""
        is_head = request.head_incarnation != 0
        if not self._watchers[is_head].acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_WATCHERS} streams watch this node already; close one, or ask with Status",
            )
        try:
            if is_head:
                self._head_came()
                if not context.add_callback(self._head_left):
                    self._head_left()  # the call was over before it began
                    return
            yield from self._statuses(request, context, has_logs=is_head)
        finally:
            self._watchers[is_head].release()

    def _statuses(
        self, request: control_pb2.WatchRequest, context: grpc.ServicerContext, *, has_logs: bool
    ) -> Iterator[control_pb2.NodeStatus]:
        interval_s = min(max(request.beat_interval_ms, 20), 1000) / 1e3
        node, num_sent = self._node, 0
        while context.is_active():
            is_last = node.is_closing
            status = node.status()
            if has_logs:
                num_sent = node.recent.fill(status, num_sent)
            yield status
            if is_last:
                return
            with node.changed:
                node.changed.wait(interval_s)

    def Drain(  # noqa: N802
        self, request: control_pb2.DrainRequest, context: grpc.ServicerContext
    ) -> control_pb2.DrainReply:
        """End this node's sessions and leave the epoch."""
        self._node.leave("drained")
        return control_pb2.DrainReply(sessions_left=self._node.status().num_sessions)

    def Holdings(  # noqa: N802
        self, request: control_pb2.HoldingsRequest, context: grpc.ServicerContext
    ) -> control_pb2.HoldingsReply:
        """What this node's disk holds of the model."""
        return self._copies.holdings(request)

    def Copy(  # noqa: N802
        self, request: control_pb2.CopyRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.CopyChunk]:
        """Bytes of the model for another node."""
        return self._copies.copy(request, context)

    def ListModels(  # noqa: N802
        self, request: control_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> control_pb2.ListModelsReply:
        """What this machine has on disk."""
        return kept_models()

    def MeasureLink(  # noqa: N802
        self, request: control_pb2.MeasureLinkRequest, context: grpc.ServicerContext
    ) -> Iterator[control_pb2.LinkReport]:
        """Measure this node's ways to another one."""
        return self.measurer.measure(request, context)

    def Diagnose(  # noqa: N802
        self, request: control_pb2.DiagnoseRequest, context: grpc.ServicerContext
    ) -> control_pb2.DiagnoseReply:
        """What is wrong with this machine, for `macrame doctor --all`."""
        return self._diagnoses.answer(request, context)

    def Trace(  # noqa: N802
        self, request: trace_pb2.TraceRequest, context: grpc.ServicerContext
    ) -> trace_pb2.TraceReply:
        """Record what this node does, for a while; or stop that."""
        return self._trace.switch(request)

    def PullTrace(  # noqa: N802
        self, request: trace_pb2.PullTraceRequest, context: grpc.ServicerContext
    ) -> Iterator[trace_pb2.TraceChunk]:
        """What was recorded."""
        return self._trace.pull(request, context)

    def _head_came(self) -> None:
        with self._lock:
            self._num_heads += 1
            if self._gone_timer is not None:
                self._gone_timer.cancel()
                self._gone_timer = None

    def _head_left(self) -> None:
        with self._lock:
            self._num_heads -= 1
            if self._num_heads or self._is_closed:
                return
            self._gone_timer = threading.Timer(HEAD_GONE_S, self._node.leave, ["the head is gone"])
            self._gone_timer.daemon = True
            self._gone_timer.start()
