"""`macrame doctor --all`: asks every node of a config to look at itself. A pool's threads ask at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import grpc

from cluster.call_trouble import Kind, call_trouble, connection_kind
from cluster.config import ClusterConfig, NodeConfig
from cluster.diagnosis import Finding, received
from cluster.diagnosis_reach import try_connect
from cluster.routes import HEAD_RANK
from cluster.rpc import connect
from cluster.tls import Credentials
from deploy.doctor_compare import Clock, NodeAnswer, compare_nodes, ring_findings
from proto import control_pb2, control_pb2_grpc, head_pb2, head_pb2_grpc

ANSWER_S = 5.0
DIAGNOSIS_LIMIT_S = 60.0
NUM_CLOCKS = 9
MAX_ASKED = 16  # at once
NO_CREDENTIALS = "no token or certificate that can be used is on this machine (see security)"


@dataclass(frozen=True, slots=True)
class RingReport:
    """told: name and findings of each node that answered. findings: of the ring and of absent nodes."""

    findings: list[Finding]
    told: list[tuple[str, list[Finding]]]
    nodes: list[dict[str, Any]]


def examine_ring(
    config: ClusterConfig, credentials: Credentials | None, show: Callable[[str], object]
) -> RingReport:
    """Ask all used nodes at once, and compare their answers."""
    nodes = [node for node in config.nodes if node.use]
    show(f"{len(nodes)} nodes of {config.path}")
    if credentials is None:
        answers = [NodeAnswer(node, trouble=NO_CREDENTIALS) for node in nodes]
    else:
        with ThreadPoolExecutor(MAX_ASKED, thread_name_prefix="ThreadPoolExecutor-doctor") as pool:
            answers = list(pool.map(lambda node: ask(node, credentials), nodes))
    show("the state of the ring")
    status = None
    if credentials is not None and not answers[0].trouble:
        status = _cluster_status(config.nodes[HEAD_RANK], credentials)
    findings = [*compare_nodes(config, answers), *ring_findings(config, status)]
    told = [(answer.node.name, answer.findings) for answer in answers]
    return RingReport(findings, told, [answer.as_dict() for answer in answers])


def ask(node: NodeConfig, credentials: Credentials) -> NodeAnswer:
    """One node: its clock first, then what it finds. Takes DIAGNOSIS_LIMIT_S at most."""
    error = try_connect(node)
    if error is not None:
        return NodeAnswer(node, error=error)
    with connect(node.address, credentials, node.name) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        try:
            clock = measure_clock(stub)
            reply = stub.Diagnose(control_pb2.DiagnoseRequest(), timeout=DIAGNOSIS_LIMIT_S)
        except grpc.RpcError as failure:
            call = cast(grpc.Call, failure)
            if call.code() is grpc.StatusCode.UNIMPLEMENTED:
                return _older(node, stub)
            if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return NodeAnswer(node, trouble=call.details() or "it is busy")
            trouble = call_trouble(failure, node, credentials)
            if (
                connection_kind(call.details() or "") is Kind.TIMED_OUT
            ):  # the system took the connection above, and no program speaks
                trouble = f"{node.address} takes connections and does not answer in time; is it frozen?"
            return NodeAnswer(node, trouble=trouble)
    findings = []
    for one in reply.findings:
        with contextlib.suppress(ValueError):  # of a newer version: a status that we do not know
            findings.append(received(one.check, one.status, one.what, one.why, one.mend))
    return NodeAnswer(node, reply=reply, clock=clock, findings=findings)


def measure_clock(stub: control_pb2_grpc.ControlStub) -> Clock:
    """The other clock minus ours, from the quickest of several round trips.

    The other side read its clock somewhere between our sending and our receiving: the middle is off by
    half of the round trip at most (Cristian, Probabilistic clock synchronization, 1989). Raises RpcError.
    """
    best: Clock | None = None
    request = control_pb2.DiagnoseRequest(is_clock_only=True)
    for _ in range(NUM_CLOCKS):
        began_s, began = time.time(), time.perf_counter()
        reply = stub.Diagnose(request, timeout=ANSWER_S)
        half_s = (time.perf_counter() - began) / 2
        clock = Clock(reply.clock_s - (began_s + half_s), half_s)
        if best is None or clock.uncertainty_s < best.uncertainty_s:
            best = clock
    assert best is not None
    return best


def _older(node: NodeConfig, stub: control_pb2_grpc.ControlStub) -> NodeAnswer:
    """A macrame that does not know this question yet still says which version it is."""
    try:
        profile = stub.Profile(control_pb2.ProfileRequest(), timeout=ANSWER_S)
    except grpc.RpcError:
        return NodeAnswer(node, trouble=f"{node.address} is no macrame node")
    return NodeAnswer(node, older=profile)


def _cluster_status(head: NodeConfig, credentials: Credentials) -> head_pb2.ClusterStatus | None:
    with connect(head.address, credentials, head.name) as channel:
        try:
            status: head_pb2.ClusterStatus = head_pb2_grpc.HeadStub(channel).GetCluster(
                head_pb2.ClusterRequest(), timeout=ANSWER_S
            )
        except grpc.RpcError:
            return None
    return status
