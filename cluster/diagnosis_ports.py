"""Doctor's check of the ports that this machine's nodes and its HTTP API listen on. Any thread."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import socket
from collections.abc import Iterable

import grpc
import psutil

from cluster.call_trouble import call_trouble
from cluster.config import ClusterConfig, NodeConfig
from cluster.console import as_word
from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.peer_links import resolve
from cluster.routes import HEAD_RANK
from cluster.rpc import connect, format_address
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc

ASK_S = 2.0
OWN_NODE = "run_node"
_OTHERS = re.compile("another token|certificate|does not speak TLS")  # of the call's trouble


def ports(subject: Subject) -> Iterable[Finding]:
    """Whether each could listen now, or does already."""
    if reason := subject.why_no_nodes:
        yield skipped("ports", reason)
        return
    if subject.running is not None:
        yield fine("ports", f"this node listens at {subject.nodes[0].address}")
        return
    config = subject.config
    assert config is not None
    for node in subject.nodes:
        yield _node(node, config, subject.credentials)
        if node.rank == HEAD_RANK and config.api.port:
            yield _api(config)


def _node(node: NodeConfig, config: ClusterConfig, credentials: Credentials | None) -> Finding:
    code = _bind_errno(node.host, node.port)
    if code == 0:
        return fine("ports", f"{node.address} is free for {node.name}")
    if code != errno.EADDRINUSE:
        return _no_address(f"node {node.name} cannot listen", node.host, code)
    found = None if credentials is None else who_answers(node, credentials)
    if isinstance(found, str):
        return _stranger(found, config)
    if found is None:
        return _taken(node.address, node.port, f"node {node.name}", '"port" of the node')
    if found.config_digest != config.digest:
        return Finding(
            "config",
            "error",
            f"{node.address} has node {found.name!r} of another config (digest {found.config_digest}, here "
            f"{config.digest})",
            "nodes whose configs differ refuse each other: the file was edited after that node was started",
            f"stop that node, then run_node --rank {node.rank} --config {as_word(config.path)}",
        )
    return fine("ports", f"{node.name} runs at {node.address}")


def _api(config: ClusterConfig) -> Finding:
    api = config.api
    address = format_address(api.host, api.port)
    code = _bind_errno(api.host, api.port)
    if code == 0:
        return fine("ports", f"{address} is free for the HTTP API")
    if code != errno.EADDRINUSE:
        return _no_address("the HTTP API cannot listen", api.host, code)
    if _is_our_api(api.host, api.port):
        return fine("ports", f"the HTTP API runs at {address}")
    return _taken(address, api.port, "the HTTP API", '"port" of "api"')


def _no_address(what: str, host: str, code: int) -> Finding:
    return Finding(
        "ports",
        "error",
        f"{what} at {host}: {os.strerror(code)}",
        "it ends at its start",
        "ifconfig    # shows this machine's addresses; put one of them, or its name, into the cluster file",
    )


def _taken(address: str, port: int, whose: str, key: str) -> Finding:
    pid, name = _owner(port)
    if pid and name == OWN_NODE:
        return Finding(
            "ports",
            "error",
            f"{address} has a run_node that does not take our calls (process {pid})",
            f"{whose} cannot listen there: that one was left behind, is frozen, or is of another cluster",
            f"ps -o pid,stat,etime,args -p {pid}    # T is stopped: kill -CONT {pid}; "
            f"else kill {pid}, and start it anew",
        )
    who = f"{name} (process {pid})" if pid else "a process of another user"
    return Finding(
        "ports",
        "error",
        f"{address} is taken by {who}",
        f"{whose} cannot listen there, and ends at its start",
        (f"kill {pid}" if pid else f"sudo lsof -nP -iTCP:{port} -sTCP:LISTEN    # shows it; stop it")
        + f"    # or give {key} in the cluster file another value",
    )


def _owner(port: int) -> tuple[int, str]:
    """Process id and name of who listens there, OWN_NODE for one of ours; 0: the system does not tell."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            is_there = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if is_there and connection.pid:
                process = psutil.Process(connection.pid)
                is_ours = any("run_node" in argument for argument in process.cmdline()[:4])
                return connection.pid, OWN_NODE if is_ours else process.name()
    return 0, ""


def _bind_errno(host: str, port: int) -> int:
    """0 where a server could listen on every address of the host now, else the errno."""
    try:
        found = resolve(host)
    except OSError:
        return errno.EADDRNOTAVAIL
    for ip in found:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ip, port))
                probe.listen(1)
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    return error.errno or errno.EIO
    return 0


def _stranger(trouble: str, config: ClusterConfig) -> Finding:
    """A node is there that has other credentials. As a check it is one of configs: --all compares them."""
    what, _, mend = trouble.partition(": ")
    show = f"macrame certs show --config {as_word(config.path)}    # {mend or 'compare it with the other'}"
    return Finding(
        "config",
        "error",
        what,
        "a node is there whose certificate or token is not of this cluster, and the two refuse each other",
        "give both the same security.token_file" if "another token" in trouble else show,
    )


def who_answers(node: NodeConfig, credentials: Credentials) -> control_pb2.NodeProfile | str | None:
    """What the macrame node there says of itself, or why it and we do not; None: something else listens."""
    with connect(node.address, credentials, node.name) as channel:
        try:
            request = control_pb2.ProfileRequest()
            stub = control_pb2_grpc.ControlStub(channel)
            found: control_pb2.NodeProfile = stub.Profile(request, timeout=ASK_S)
            return found
        except grpc.RpcError as error:
            trouble = call_trouble(error, node, credentials)
            return trouble if _OTHERS.search(trouble) else None


def _is_our_api(host: str, port: int) -> bool:
    """Whether /health there answers as ours does."""
    there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(there, port, timeout=ASK_S)
    try:
        connection.request("GET", "/health")
        told = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()
    return isinstance(told, dict) and "status" in told
