"""Why a call to another node failed, in a sentence that says what to do. Any thread; may connect again."""

from __future__ import annotations

import re
from enum import Enum

import grpc

from cluster.config import NodeConfig
from cluster.tls import Credentials
from cluster.tls_trouble import handshake_trouble


def call_trouble(error: grpc.RpcError, node: NodeConfig, credentials: Credentials | str | None) -> str:
    """The sentence for an error of a call to the node's own address."""
    assert isinstance(error, grpc.Call)
    address, code = node.address, error.code()
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return f"{address} has another token; use that of the ring"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{address} is no macrame node, or one of an older version; install the same on every node"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} does not answer in time; is it frozen?"
    details = error.details() or ""
    trouble = handshake_trouble(address, credentials, address, node.name, details)
    return trouble or f"there is no connection to {address}: {connection_trouble(details)}"


class Kind(Enum):
    """Why gRPC has no connection."""

    NO_NAME = "its name is not known here; see the config's host, or give its address instead"
    NO_ROUTE = "no route to host; is it switched on, awake, and in the same network?"
    NOT_ALLOWED = (
        "No route to host (errno 65); macOS says this too where a program may not use the local network: "
        "allow it in System Settings, Privacy & Security, Local Network"
    )
    REFUSED = "connection refused, nothing listens there; is a node started there?"
    NO_TLS = "the TLS handshake failed; 'macrame certs show' says how the certificates stand"
    TIMED_OUT = "it does not answer in time; is it frozen, switched off, or behind a firewall?"
    CLOSED = "the other side closed the connection"


# What gRPC, its resolvers and strerror say, the first that fits. errno in parentheses, where gRPC has it: 65
# is EHOSTUNREACH of macOS only; 113 there of Linux.
_TEXTS = (
    (Kind.NO_NAME, r"resolving|DNS resolution|name not found|lookup (error|failed)|nodename nor servname"),
    (Kind.NOT_ALLOWED, r"No route to host \(65\)|errno:? ?65\b"),
    (Kind.NO_ROUTE, r"No route to host|Network is (unreachable|down)|Host is down|Host is unreachable"),
    (Kind.REFUSED, r"Connection refused"),
    (Kind.NO_TLS, r"handshake|SSL|TLS|certificate|[Vv]erification"),
    (Kind.TIMED_OUT, r"timed out|[Tt]imeout|[Dd]eadline|FD [Ss]hutdown"),
    (Kind.CLOSED, r"Socket closed|reset by peer|Connection reset|Broken pipe|Stream removed|GOAWAY|recvmsg"),
)


def connection_kind(details: str) -> Kind | None:
    """What gRPC's details of a failed call mean; None: they are no matter of the connection. Pure."""
    return next((kind for kind, pattern in _TEXTS if re.search(pattern, details)), None)


def connection_trouble(details: str) -> str:
    """The same as the end of a sentence; what is not known goes on as gRPC said it, in one line."""
    kind = connection_kind(details)
    if kind is not None:
        return kind.value
    return " ".join(details.split()) or "gRPC gives no reason"
