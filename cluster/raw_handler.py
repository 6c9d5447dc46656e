"""Serves a bidirectional method whose messages an object of each call deserialises itself.

So they reach their stream in the thread in which gRPC hands them out, which calls from any of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc


class RawStream(Protocol):
    """One call."""

    def serve(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]: ...

    def deserialize(self, message: bytes) -> Any: ...


class RawHandler(grpc.GenericRpcHandler):
    """Makes an object for each call of `method`."""

    def __init__(self, method: str, make: Callable[[], RawStream]) -> None:
        self._method, self._make = method, make

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method != self._method:
            return None
        stream = self._make()
        return grpc.stream_stream_rpc_method_handler(stream.serve, request_deserializer=stream.deserialize)
