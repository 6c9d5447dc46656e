"""The node's end of `macrame doctor --all`: its clock at once, or all its checks. gRPC handler threads."""

from __future__ import annotations

import platform
import socket
import threading
import time

import grpc

from cluster.node import Node
from cluster.versions import macrame_version, mlx_lm_version, mlx_version
from proto import control_pb2

BUSY = "another macrame doctor has this node look at itself; try again when it is done"


class DiagnosisService:
    """One diagnosis at a time: each takes a handler thread for seconds."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()

    def answer(
        self, request: control_pb2.DiagnoseRequest, context: grpc.ServicerContext
    ) -> control_pb2.DiagnoseReply:
        """The clock alone, or everything."""
        if request.is_clock_only:
            return control_pb2.DiagnoseReply(clock_s=time.time())
        if not self._lock.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY)
        try:
            return self._diagnosed()
        finally:
            self._lock.release()

    def _diagnosed(self) -> control_pb2.DiagnoseReply:
        from cluster.diagnosis import Subject
        from cluster.diagnosis_checks import diagnose  # a node that nobody asks does without them

        node = self._node
        subject = Subject(node.config, (node.rank,), node.rank, node.credentials)
        findings = [
            control_pb2.Finding(check=f.check, status=f.status, what=f.what, why=f.why, mend=f.mend)
            for f in diagnose(subject)
        ]
        return control_pb2.DiagnoseReply(
            clock_s=time.time(),
            name=node.name,
            rank=node.rank,
            host_name=socket.gethostname(),
            platform=platform.platform(),
            python_version=platform.python_version(),
            macrame_version=macrame_version(),
            mlx_version=mlx_version(),
            mlx_lm_version=mlx_lm_version(),
            config_digest=node.config.digest,
            model_digest=node.model.digest,
            findings=findings,
        )
