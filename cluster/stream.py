"""A client's stream of raw messages: any thread puts, one thread iterates.

grpcio's public stream call moves each message to a thread of its own and waits there until it is sent.
DirectStream sends in the thread that puts and receives in the thread that iterates: half the CPU and
latency of a hop (tests/benchmarks/hop.py). It rests on the call that grpcio itself uses for single-threaded
streams, which is internal; where a grpcio has it no more, open_stream() takes the public one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import grpc


class StreamEnded(Exception):  # noqa: N818
    """The stream is over; code OK where the server ended it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class Stream(Protocol):
    """One bidirectional call."""

    def put(self, message: bytes) -> None:
        """Send after what was put before; nothing happens once the stream is over. Never blocks."""

    def __iter__(self) -> Iterator[bytes]:
        """What the server sends; ends with StreamEnded, never otherwise."""

    def cancel(self) -> None:
        """End the stream; the iterating thread gets StreamEnded at once."""

    def drain(self) -> None:
        """After StreamEnded, in the iterating thread: wait until gRPC has let go of the call."""


def open_stream(channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> Stream:
    """Begin the call; `channel` is one without interceptors."""
    try:
        return DirectStream(channel, method, metadata)
    except (ImportError, AttributeError, TypeError):  # another grpcio than those we know
        return PlainStream(channel, method, metadata)


class PlainStream:
    """The stream over grpcio's public interface."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> None:
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        requests: Iterator[Any] = iter(self._outbox.get, None)
        self._call: Any = channel.stream_stream(method)(requests, metadata=metadata)
        self.put = self._outbox.put

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            call: Any = error
            raise StreamEnded(call.code(), call.details()) from None
        raise StreamEnded(grpc.StatusCode.OK, "")

    def cancel(self) -> None:
        self._call.cancel()

    def drain(self) -> None:
        self._outbox.put(None)  # lets gRPC's thread go


_OPENED, _SENT, _RECEIVED, _STATUS = "opened", "sent", "received", "status"  # tags of gRPC's operations


class DirectStream:
    """The stream over grpcio's internal segregated call."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> None:
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        inner: Any = channel._channel  # type: ignore[attr-defined]
        self._cygrpc: Any = cygrpc
        self._receive = (cygrpc.ReceiveMessageOperation(0),)
        begin = (
            (
                (cygrpc.SendInitialMetadataOperation(metadata, 0), cygrpc.ReceiveInitialMetadataOperation(0)),
                _OPENED,
            ),
            ((cygrpc.ReceiveStatusOnClientOperation(0),), _STATUS),
        )
        handle = inner.get_registered_call_handle(method.encode())
        self._call = inner.segregated_call(
            0, method.encode(), None, None, metadata, None, begin, None, handle
        )
        self._lock = threading.Lock()  # guards what follows
        self._num_due = 2  # operations whose event has not come yet
        self._unsent: deque[bytes] = deque()
        self._is_sending = False
        self._is_over = False
        self._operate(self._receive, _RECEIVED)

    def put(self, message: bytes) -> None:
        with self._lock:
            if self._is_sending:  # gRPC takes one at a time
                self._unsent.append(message)
            elif not self._is_over:
                self._is_sending = True
                self._operate((self._cygrpc.SendMessageOperation(message, 0),), _SENT)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            event = self._next_event()
            if event.tag is _SENT:
                self._send_next()
            elif event.tag is _RECEIVED:
                message = event.batch_operations[0].message()
                if message is not None:  # None: the status comes next
                    with self._lock:
                        self._operate(self._receive, _RECEIVED)
                    yield message
            elif event.tag is _STATUS:
                with self._lock:
                    self._is_over = True
                    self._unsent.clear()
                status = event.batch_operations[0]
                raise StreamEnded(_status_code(status.code()), status.details() or "")

    def cancel(self) -> None:
        self._call.cancel(self._cygrpc.StatusCode.cancelled, "cancelled")

    def drain(self) -> None:
        while self._num_due:
            self._next_event()

    def _send_next(self) -> None:
        with self._lock:
            self._is_sending = bool(self._unsent)
            if self._unsent:
                self._operate((self._cygrpc.SendMessageOperation(self._unsent.popleft(), 0),), _SENT)

    def _operate(self, operations: tuple[Any, ...], tag: str) -> None:
        """With the lock held. Nothing starts once all that was due has come."""
        if self._call.operate(operations, tag):
            self._num_due += 1

    def _next_event(self) -> Any:
        event = self._call.next_event()
        with self._lock:
            self._num_due -= 1
        return event


def _status_code(number: int) -> grpc.StatusCode:
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)
