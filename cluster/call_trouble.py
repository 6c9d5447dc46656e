"""Why a call to another node failed, in a sentence that says what to do. Any thread; may connect again."""

from __future__ import annotations

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
    details = error.details() or "no reason given"
    trouble = handshake_trouble(address, credentials, address, node.name, details)
    return trouble or f"the connection to {address} broke: {details}"
