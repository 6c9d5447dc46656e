"""gRPC's own words for a connection that there is none of, and what a user reads instead."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import grpc
import pytest

from cluster.call_trouble import Kind, connection_kind, connection_trouble
from cluster.rpc import connect
from proto import control_pb2, control_pb2_grpc
from tests.ring_processes import free_ports

ALL = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.2:50051: "

# as grpcio 1.6x to 1.8x print them, on Linux and on macOS
SAID = {
    ALL + "Failed to connect to remote host: Connection refused": Kind.REFUSED,
    ALL + "Failed to connect to remote host: connect: Connection refused (61)": Kind.REFUSED,
    ALL + "Failed to connect to remote host: FD shutdown": Kind.TIMED_OUT,
    ALL + "connection attempt timed out before receiving SETTINGS frame": Kind.TIMED_OUT,
    ALL + "Failed to connect to remote host: Timeout occurred: FD Shutdown": Kind.TIMED_OUT,
    "Deadline Exceeded": Kind.TIMED_OUT,
    "DNS resolution failed for mini2.local:50051: C-ares status is not ARES_SUCCESS": Kind.NO_NAME,
    "errors resolving mini2.local:50051: [field:hostname lookup error:address lookup failed]": Kind.NO_NAME,
    ALL + "Failed to connect to remote host: No route to host": Kind.NO_ROUTE,
    ALL + "Failed to connect to remote host: connect: No route to host (113)": Kind.NO_ROUTE,
    ALL + "Failed to connect to remote host: connect: No route to host (65)": Kind.NOT_ALLOWED,
    ALL + "Failed to connect to remote host: Network is unreachable (51)": Kind.NO_ROUTE,
    ALL + "Failed to connect to remote host: Host is down (64)": Kind.NO_ROUTE,
    ALL + "Ssl handshake failed: SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED": Kind.NO_TLS,
    ALL + "Peer name mini3 is not in peer certificate": Kind.NO_TLS,
    ALL + "tls: handshaker shutdown": Kind.NO_TLS,
    ALL + "Socket closed": Kind.CLOSED,
    "recvmsg:Connection reset by peer": Kind.CLOSED,
}


@pytest.mark.parametrize("said", SAID)
def test_what_grpc_says_is_told_in_plain_words(said: str) -> None:
    assert connection_kind(said) is SAID[said]
    assert connection_trouble(said) == SAID[said].value
    assert "ipv4" not in connection_trouble(said)


def test_what_is_not_known_stays() -> None:
    assert connection_kind("the head is stopping") is None
    assert connection_trouble("a new\n  text of gRPC") == "a new text of gRPC"
    assert connection_trouble("") == "gRPC gives no reason"


def said_by_grpc(address: str) -> str:
    with connect(address, None) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20.0)
        call: SimpleNamespace = caught.value  # type: ignore[assignment]
        return str(call.details())


def test_a_real_connection_that_nobody_takes() -> None:
    assert connection_kind(said_by_grpc(f"127.0.0.1:{free_ports(1)[0]}")) is Kind.REFUSED


@pytest.mark.long  # gRPC waits for a second
def test_a_real_connection_that_nobody_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        said = said_by_grpc(f"127.0.0.1:{silent.getsockname()[1]}")
        assert connection_kind(said) is Kind.TIMED_OUT, said
