"""The far end of a link's measurement: takes frames as an edge does, and answers each at once.

As in cluster/edge_service.py the server's polling thread decodes the frames, a handler thread per stream
sends the replies, and a reader thread asks gRPC for the next message. Nothing is computed or kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc

from cluster.edge_sender import PROTOCOL
from cluster.heartbeat import heartbeat
from cluster.raw_handler import RawHandler
from proto import ring_pb2
from proto.codec import PART_BYTES, FrameAssembler, WireError

PROBE_METHOD = "/macrame.v1.Ring/Probe"
WINDOW_BYTES = 8 << 20
MAX_PROBE_BYTES = 256 << 20  # of one stream
PROBE_SILENCE_S = 5.0
MAX_PROBE_S = 30.0
MAX_PROBES = 2  # at once: more would measure each other


class ProbeService:
    """Serves Probe. `accept(hello)` gives the sentence that refuses a measurement, or None."""

    def __init__(self, accept: Callable[[ring_pb2.Hello], str | None], incarnation: int) -> None:
        self.accept, self.incarnation = accept, incarnation
        self.places = threading.BoundedSemaphore(MAX_PROBES)

    def add_to(self, server: grpc.Server) -> None:
        """Serve measurements there. Each holds one of the server's workers while it runs."""
        server.add_generic_rpc_handlers((RawHandler(PROBE_METHOD, lambda: _Probe(self)),))


class _Probe:
    """One measurement."""

    def __init__(self, service: ProbeService) -> None:
        self._service = service
        self._assembler = FrameAssembler(PART_BYTES)
        self._replies: SimpleQueue[bytes | None] = SimpleQueue()
        self._cancel: Callable[[], object] = bool  # the RPC, once it runs
        self._is_greeted = False
        self._num_bytes = 0
        self._silent_s = self._age_s = 0.0
        self._bad = ""  # what was wrong with what came

    # -- handler thread ----------------------------------------------------------------------------------
    def serve(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The RPC: greeting, then a reply for each frame until the caller leaves."""
        self._cancel = context.cancel
        if not self._service.places.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_PROBES} links to this node are being measured already; try again when they are done",
            )
        heartbeat.watch(self)
        try:
            code, reason = self._greet(requests)
            if code is not None:
                context.abort(code, reason)
            self._is_greeted = True
            threading.Thread(target=self._read, args=(requests,), name="probe", daemon=True).start()
            welcome = ring_pb2.Welcome(incarnation=self._service.incarnation, window_bytes=WINDOW_BYTES)
            yield ring_pb2.EdgeReply(welcome=welcome).SerializeToString()
            yield from iter(self._replies.get, None)
            if self._bad:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, self._bad)
        finally:
            heartbeat.unwatch(self)
            self._service.places.release()

    def _greet(self, requests: Iterator[Any]) -> tuple[grpc.StatusCode | None, str]:
        try:
            message = next(requests, None)
            greeting = None if message is None else self._assembler.feed(message)
        except WireError as error:
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except grpc.RpcError:
            return grpc.StatusCode.CANCELLED, "the measurement ended before HELLO"
        if greeting is None or greeting[0].kind != ring_pb2.HELLO:
            return grpc.StatusCode.INVALID_ARGUMENT, "a measurement begins with HELLO"
        hello = greeting[0].hello
        if hello.protocol != PROTOCOL:
            return (
                grpc.StatusCode.FAILED_PRECONDITION,
                f"rank {hello.from_rank} speaks version {hello.protocol} of the protocol and this node "
                f"version {PROTOCOL}; install the same macrame on every node",
            )
        refusal = self._service.accept(hello)
        return (None, "") if refusal is None else (grpc.StatusCode.FAILED_PRECONDITION, refusal)

    # -- reader thread -----------------------------------------------------------------------------------
    def _read(self, requests: Iterator[Any]) -> None:
        """Asks gRPC for one message after another; deserialize() has answered each when it comes."""
        try:
            for _ in requests:
                if self._bad:
                    break
        except grpc.RpcError:
            pass  # the caller left, or was cut off
        self._replies.put(None)

    # -- gRPC's thread -----------------------------------------------------------------------------------
    def deserialize(self, message: bytes) -> bytes:
        """Answers a frame right where it came in."""
        self._silent_s = 0.0
        if not self._is_greeted:
            return message
        try:
            if not self._bad:
                self._take(message)
        except WireError as error:
            self._bad = str(error)
        return b""

    def _take(self, message: bytes) -> None:
        self._num_bytes += len(message)
        if self._num_bytes > MAX_PROBE_BYTES:
            raise WireError(f"a measurement may send {MAX_PROBE_BYTES} bytes, and more came")
        whole = self._assembler.feed(message)
        if whole is None or whole[0].kind != ring_pb2.STEP:
            raise WireError("a measurement consists of whole STEPs")
        self._replies.put(ring_pb2.EdgeReply(credit=ring_pb2.Credit(bytes=len(message))).SerializeToString())

    # -- timer thread ------------------------------------------------------------------------------------
    def tick(self, elapsed_s: float) -> None:
        """Cut off a caller that is silent, or takes too long."""
        self._silent_s += elapsed_s
        self._age_s += elapsed_s
        if self._silent_s >= PROBE_SILENCE_S or self._age_s >= MAX_PROBE_S:
            self._cancel()
