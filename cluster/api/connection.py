"""One HTTP connection: uvicorn's, with a bound on the head of a request and an end that clients can read.

Event loop only.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cluster.api.errors import ApiError

MAX_HEAD_BYTES = 64 << 10  # request line and headers, or the trailers of a chunked body
MAX_DRAIN_BYTES = 64 << 20  # read and dropped of a refused request before the connection is cut
LINGER_S = 30.0  # for a client to finish writing and read the refusal


class Connection(HttpToolsProtocol):
    """Refuses long heads with 431, and lingers when an answer goes out before its request has come in.

    A socket that is closed with unread bytes is reset, and a reset discards the answer at a client that
    writes first and reads then. So its own side is closed, and the rest is read and dropped (RFC 9112, 9.6).
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._num_head_bytes = 0  # received since the parser last gave something away
        self._num_drained_bytes = 0
        self._lingering: asyncio.TimerHandle | None = None

    # -- what arrives -------------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        # In pieces, so that one head after another is counted from its own first byte.
        while data and self._lingering is None and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._num_head_bytes
            piece, data = data[:room], data[room:]
            self._num_head_bytes += len(piece)
            super().data_received(piece)
            if self._num_head_bytes == MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse_head()
        if self._lingering is not None:
            self._num_drained_bytes += len(data)
            if self._num_drained_bytes > MAX_DRAIN_BYTES:
                self.transport.close()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = 0
        super().on_headers_complete()
        self.cycle.transport = _CycleTransport(self)

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_head_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    # -- how it ends --------------------------------------------------------------------------------------
    def on_response_complete(self) -> None:
        if self._lingering is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1

    def shutdown(self) -> None:
        if self._lingering is None:
            super().shutdown()
        else:
            self.transport.close()

    def close_after_response(self) -> None:
        """Close now if all of the request has been read, else once the client is done."""
        if self.cycle.more_body and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        cycle = self.cycle
        is_between = cycle is None or cycle.response_complete
        if not is_between and not (cycle.more_body and not cycle.response_started and not self.pipeline):
            self.transport.close()  # an answer to an earlier request is under way: a 431 would cut into it
            return
        if not is_between:
            cycle.disconnected = True  # its handler ends, and writes nothing any more
            cycle.message_event.set()
        self.transport.write(_head_too_large())
        self._linger()

    def _linger(self) -> None:
        self._lingering = self.loop.call_later(LINGER_S, self.transport.close)
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()


class _CycleTransport(asyncio.Transport):
    """What uvicorn's request cycle uses of its transport; closing it may linger."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.close_after_response()


def _head_too_large() -> bytes:
    error = ApiError(
        431, f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.", code="headers_too_large"
    )
    body = json.dumps(error.content()).encode()
    return (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
    )
