"""The receiving end of edges.

The server's one polling thread decodes frames and calls on_frame, where gRPC would otherwise deserialise. Per
stream a handler thread sends replies, and a reader thread asks gRPC for the next message. consume() may be
called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc

from cluster.edge_sender import CREDIT_BATCH_BYTES, EDGE_METHOD, NOT_ASSIGNED, PROTOCOL
from cluster.heartbeat import SILENCE_LIMIT_S, heartbeat
from cluster.raw_handler import RawHandler
from cluster.trace_recorder import Kind, recorder
from proto import ring_pb2
from proto.codec import MAX_FRAME_BYTES, FrameAssembler, Tensor, WireError

logger = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20
CLOSING = "it is closing"
TAKEN = "another stream of the same edge is open"


@dataclass(frozen=True, slots=True)
class IncomingFrame:
    """A STEP or RESULT of the edge's own epoch; its bytes count against the sender until consume()."""

    hello: ring_pb2.Hello  # of the edge it came by
    frame: ring_pb2.Frame
    tensors: list[Tensor]  # data are views; they keep the message alive
    consume: Callable[[], None]  # once, when its memory is free again


class EdgeService:
    """Accepts edges and hands their frames on.

    accept(hello) runs on an RPC thread and gives None, NOT_ASSIGNED (the sender tries again) or the
    sentence that refuses. on_frame, `beat` and on_beat run on the thread that polls for the whole server, so
    they must be quick and may never wait for another RPC. on_edge_down(hello, reason) runs on the edge's
    reader thread; no frame of the edge comes after it, and neither comes after close().
    """

    def __init__(
        self,
        *,
        accept: Callable[[ring_pb2.Hello], str | None],
        on_frame: Callable[[IncomingFrame], None],
        on_edge_down: Callable[[ring_pb2.Hello, str], None],
        beat: Callable[[], ring_pb2.Beat],
        incarnation: int,
        on_beat: Callable[[ring_pb2.Hello, ring_pb2.Beat], None] | None = None,
        window_bytes: int = WINDOW_BYTES,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self.accept, self.on_frame, self.on_edge_down = accept, on_frame, on_edge_down
        self.beat, self.on_beat = beat, on_beat
        self.incarnation, self.window_bytes, self.max_frame_bytes = incarnation, window_bytes, max_frame_bytes
        self.silence_limit_s = silence_limit_s
        self._lock = threading.Lock()
        self._streams: set[_Stream] = set()
        self.is_closing = False

    def add_to(self, server: grpc.Server) -> None:
        """Serve edges there. Each holds one of the server's workers for its life."""
        server.add_generic_rpc_handlers((RawHandler(EDGE_METHOD, lambda: _Stream(self)),))

    def abort(self, reason: str, *, before_epoch: int | None = None) -> None:
        """End all edges, or those of older epochs; the senders are told the reason."""
        with self._lock:
            streams = tuple(self._streams)
        for stream in streams:
            if before_epoch is None or stream.hello.epoch < before_epoch:
                stream.abort(reason)

    def close(self) -> None:
        """End all edges and refuse new ones; returns within a second, frozen peers or not."""
        with self._lock:
            self.is_closing = True
            streams = tuple(self._streams)
        for stream in streams:
            stream.abort(CLOSING)
        for stream in streams:
            stream.join()

    def enter(self, stream: _Stream) -> str:
        """The stream was accepted; a sentence if the service is closing or has this edge already."""
        with self._lock:
            if self.is_closing:
                return CLOSING
            if any(other.edge == stream.edge for other in self._streams):
                return TAKEN
            self._streams.add(stream)
            return ""

    def leave(self, stream: _Stream) -> None:
        """The stream is over."""
        with self._lock:
            self._streams.discard(stream)


class _Stream:
    """One incoming edge."""

    def __init__(self, service: EdgeService) -> None:
        self._service = service
        self._assembler = FrameAssembler(service.max_frame_bytes)
        self._frame_bytes = 0  # of the messages of the frame that is coming
        self._replies: SimpleQueue[bytes | None] = SimpleQueue()
        self._cancel: Callable[[], object] = bool  # the RPC, once it runs
        self._reader: threading.Thread | None = None
        self._is_greeted = False
        self.hello = ring_pb2.Hello()
        self._lock = threading.Lock()  # guards what follows
        self._uncredited_bytes = 0  # of frames received
        self._due_bytes = 0  # of these, consumed
        self._silent_s = 0.0
        self._end: tuple[grpc.StatusCode | None, str] = (None, "")

    @property
    def edge(self) -> tuple[int, int, int, int, int]:
        """What two streams of one sender's edge have in common."""
        hello = self.hello
        return hello.epoch, hello.from_rank, hello.to_rank, hello.start, hello.stop

    # -- handler thread ----------------------------------------------------------------------------------
    def serve(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The RPC: greeting, then the replies that other threads put, until the reader ends."""
        self._cancel = context.cancel
        heartbeat.watch(self)
        try:
            code, reason = self._greet(requests)
            if code is not None:
                context.abort(code, reason)
            if refusal := self._service.enter(self):
                context.abort(grpc.StatusCode.UNAVAILABLE, refusal)
            self._is_greeted = True
            name = f"edge from rank {self.hello.from_rank}"
            self._reader = threading.Thread(target=self._read, args=(requests,), name=name, daemon=True)
            self._reader.start()
            welcome = ring_pb2.Welcome(
                incarnation=self._service.incarnation, window_bytes=self._service.window_bytes
            )
            yield ring_pb2.EdgeReply(welcome=welcome).SerializeToString()
            yield from iter(self._replies.get, None)
            code, reason = self._end
            if code is not None:
                context.abort(code, reason)
        finally:
            heartbeat.unwatch(self)
            self._service.leave(self)

    def _greet(self, requests: Iterator[Any]) -> tuple[grpc.StatusCode | None, str]:
        """Read HELLO and ask accept(); a code and a sentence if the edge is not wanted."""
        try:
            message = next(requests, None)
            greeting = None if message is None else self._assembler.feed(message)
        except WireError as error:
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except grpc.RpcError:
            return grpc.StatusCode.CANCELLED, "the edge ended before HELLO"
        if greeting is None or greeting[0].kind != ring_pb2.HELLO:
            return grpc.StatusCode.INVALID_ARGUMENT, "an edge begins with HELLO"
        self.hello = greeting[0].hello
        if self.hello.protocol != PROTOCOL:
            return (
                grpc.StatusCode.FAILED_PRECONDITION,
                f"rank {self.hello.from_rank} speaks version {self.hello.protocol} of the protocol and this "
                f"node version {PROTOCOL}; install the same macrame on every node",
            )
        refusal = self._service.accept(self.hello)
        if refusal is None:
            return None, ""
        if refusal == NOT_ASSIGNED:
            return grpc.StatusCode.UNAVAILABLE, refusal
        return grpc.StatusCode.FAILED_PRECONDITION, refusal

    # -- reader thread -----------------------------------------------------------------------------------
    def _read(self, requests: Iterator[Any]) -> None:
        """Asks gRPC for one message after another; deserialize() has taken each when it comes."""
        try:
            for _ in requests:
                if self._end[1]:
                    break
        except grpc.RpcError:
            pass  # cancelled by the peer, by its death or by us
        self._finish(None, f"the connection from rank {self.hello.from_rank} ended")
        self._replies.put(None)
        if not self._service.is_closing:
            self._service.on_edge_down(self.hello, self._end[1])

    # -- gRPC's thread -----------------------------------------------------------------------------------
    def deserialize(self, message: bytes) -> bytes:
        """Takes a frame right where it came in: another thread's wakeup would be a good part of a hop."""
        self._silent_s = 0.0
        if not self._is_greeted:
            return message
        peer = f"rank {self.hello.from_rank}"
        try:
            if not self._end[1]:
                self._take(message)
        except WireError as error:
            self._finish(grpc.StatusCode.INVALID_ARGUMENT, f"{peer} sent a bad frame: {error}")
        except Exception as error:  # the border: the stream fails, and its sender hears of it
            logger.exception("a frame of %s could not be taken", peer)
            self._finish(grpc.StatusCode.ABORTED, f"a frame of {peer} could not be taken: {error}")
        return b""

    def _take(self, message: bytes) -> None:
        began = time.perf_counter() if recorder.on else 0.0
        whole = self._assembler.feed(message)
        if whole is not None and whole[0].kind == ring_pb2.BEAT:
            self._replies.put(ring_pb2.EdgeReply(beat=self._service.beat()).SerializeToString())
            if self._service.on_beat is not None:
                self._service.on_beat(self.hello, whole[0].beat)
            return
        self._frame_bytes += len(message)
        if (
            self._uncredited_bytes > CREDIT_BATCH_BYTES
            and self._uncredited_bytes + self._frame_bytes > self._service.window_bytes
        ):
            raise WireError(f"more than the window of {self._service.window_bytes} bytes came without credit")
        if whole is None:
            return
        frame, tensors = whole
        if frame.kind == ring_pb2.HELLO:
            raise WireError("HELLO came twice")
        nbytes, self._frame_bytes = self._frame_bytes, 0
        with self._lock:
            self._uncredited_bytes += nbytes
        if began:
            numbers, peer = (nbytes, frame.kind), self.hello.from_rank
            recorder.add(Kind.ARRIVED, frame.seq, began, time.perf_counter(), peer=peer, numbers=numbers)
        if frame.epoch != self.hello.epoch:
            self._consumed(nbytes)
            return
        self._service.on_frame(IncomingFrame(self.hello, frame, tensors, partial(self._consumed, nbytes)))

    # -- any thread --------------------------------------------------------------------------------------
    def _consumed(self, nbytes: int) -> None:
        """Credits go in batches: small frames must not cost a message each."""
        with self._lock:
            self._due_bytes += nbytes
            if self._due_bytes < CREDIT_BATCH_BYTES:
                return
            due, self._due_bytes = self._due_bytes, 0
            self._uncredited_bytes -= due
        self._replies.put(ring_pb2.EdgeReply(credit=ring_pb2.Credit(bytes=due)).SerializeToString())

    def abort(self, reason: str) -> None:
        """End the edge; the sender is told the reason."""
        self._finish(grpc.StatusCode.ABORTED, reason)
        self._replies.put(None)

    def join(self) -> None:
        """Wait for the reader's end; cut the stream off where the peer does not let it end."""
        reader = self._reader
        if reader is None or reader is threading.current_thread():
            return
        reader.join(0.3)
        if reader.is_alive():
            self._cancel()
            reader.join(0.5)

    def tick(self, elapsed_s: float) -> None:
        """Timer thread: cut off a peer that is silent."""
        self._silent_s += elapsed_s
        limit_s = self._service.silence_limit_s
        if self._silent_s >= limit_s:
            self._finish(None, f"rank {self.hello.from_rank} has been silent for {limit_s:.1f} s")
            self._cancel()

    def _finish(self, code: grpc.StatusCode | None, reason: str) -> None:
        """The first reason is the one that counts."""
        with self._lock:
            if not self._end[1]:
                self._end = code, reason
