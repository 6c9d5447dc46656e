"""The gRPC client of the head: its tokens, and a watch on whether it lives. Event loop only."""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import grpc

from cluster.api.errors import ApiError, bad_request, from_rpc, unavailable
from cluster.api.head_stream import HeadStream
from cluster.call_trouble import connection_trouble
from cluster.heartbeat import SILENCE_LIMIT_S
from cluster.rpc import keepalive, peer_options, token_metadata
from cluster.tls import Credentials
from cluster.tls_trouble import handshake_trouble
from proto import control_pb2, head_pb2, head_pb2_grpc

if TYPE_CHECKING:
    from cluster.certificate import NodeIdentity

logger = logging.getLogger(__name__)

TICK_S = 0.1
PLANNING_TIMEOUT_S = 5.0  # and for log lines
GRACE_S = 0.4  # after the silence limit what runs is ended: a frozen process never breaks a stream by itself
RETRY_S = (0.1, 0.2, 0.4, 0.8, 1.0)
MAX_MESSAGE_BYTES = 64 << 20

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]


class Generation:
    """One request. Closing it cancels the request on every stage."""

    def __init__(self, client: HeadClient, stream: HeadStream, request: head_pb2.GenerateRequest) -> None:
        self._client, self._stream = client, stream
        self._request_id = request.request_id
        self._is_enough = False
        self._inbox = stream.ask(request)

    async def read(self) -> head_pb2.GenerateReply:
        """The next reply; raises ApiError where the request failed, or ended before its finish_reason."""
        item = await self._inbox.get()
        if isinstance(item, ApiError):
            if item.status == HTTPStatus.SERVICE_UNAVAILABLE:
                self._client.doubt(item.message.rstrip("."))
            raise item
        return item

    def fail(self, reason: str) -> None:
        """Whoever reads gets a 503 with `reason`."""
        self._stream.leave(self._request_id, is_finished=False)
        self._inbox.put_nowait(unavailable(reason))

    def enough(self) -> None:
        """What comes after is not wanted, as after a stop string: the head is told so when this closes."""
        self._is_enough = True

    def close(self) -> None:
        """Leaves; a second time does nothing."""
        self._client.generations.discard(self)
        self._stream.leave(self._request_id, is_finished=self._is_enough)


class HeadClient:
    """Keeps the newest cluster status and all calls that run. `start` and `close` in the same event loop."""

    def __init__(
        self,
        address: str,
        credentials: Credentials | str | None,
        *,
        peer: str | None = None,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        self.address = address
        self._silence_limit_s = silence_limit_s  # then nothing new is sent to the head
        self._options = [*CHANNEL_OPTIONS, *keepalive(silence_limit_s)]
        self._credentials, self._peer = Credentials.of(credentials), peer
        self._shown: NodeIdentity | None = None  # our certificate, of which the channel was made
        self.generations: set[Generation] = set()
        self._stream: HeadStream | None = None  # over which all requests go; None: none has been made
        self.status: head_pb2.ClusterStatus | None = None
        self._metadata = token_metadata(self._credentials.token)
        self._silent_s = 0.0  # a tick counts at most double: this loop being busy is no silence of the head
        self._broken = "it has not answered yet"
        self._closing = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: Any = None
        self._stub: Any = None

    async def start(self) -> None:
        self._open()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._count_silence())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_stream()
        await self._channel.close()

    def _open(self) -> None:
        tls = self._credentials.tls
        if tls is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=self._options)
        else:
            self._shown = tls.current()
            options = [*self._options, *peer_options(self._peer)]
            self._channel = grpc.aio.secure_channel(self.address, tls.channel_credentials(), options=options)
        self._stub = head_pb2_grpc.HeadStub(self._channel)

    async def _reopen_if_renewed(self) -> None:
        """A channel keeps the certificate that it was made with; one that is in use needs no other."""
        tls = self._credentials.tls
        if tls is not None and not self.generations and tls.current() is not self._shown:
            await self._close_stream()
            await self._channel.close()
            self._open()

    async def _close_stream(self) -> None:
        if self._stream is not None:
            await self._stream.close()

    @property
    def trouble(self) -> str:
        """Why the head cannot be asked now; empty where it can."""
        if self._closing:
            return self._closing
        if self._broken:
            return f"The head at {self.address} cannot be reached: {self._broken}."
        if self._silent_s >= self._silence_limit_s:
            return f"The head at {self.address} has been silent for {self._silent_s:.1f} s."
        return ""

    @property
    def is_silent(self) -> bool:
        """Connected, but not heard: a frozen process."""
        return not self._broken and self._silent_s >= self._silence_limit_s

    def generate(self, request: head_pb2.GenerateRequest) -> Generation:
        """Starts a request; raises ApiError 503 where the head is not there."""
        if self.trouble:
            raise unavailable(self.trouble)
        if self._stream is None:
            self._stream = HeadStream(self._stub.Converse(metadata=self._metadata), self._stream_ended)
        generation = Generation(self, self._stream, request)
        self.generations.add(generation)
        return generation

    def _stream_ended(self) -> None:
        self._stream = None

    async def planning(self) -> str:
        """What the plan was made from, as JSON; raises ApiError where there is none, or no head."""
        if self.trouble:
            raise unavailable(self.trouble)
        try:
            reply = await self._stub.GetPlanning(
                head_pb2.PlanningRequest(), metadata=self._metadata, timeout=PLANNING_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        return f'{{"config_digest": {json.dumps(reply.config_digest)}, "planning": {reply.planning_json}}}'

    async def logs(self, rank: int | None, lines: int) -> list[dict[str, Any]]:
        """The last `lines` log lines of a rank, or of each; raises ApiError: no such rank, no head."""
        if self.trouble:
            raise unavailable(self.trouble)
        request = head_pb2.LogsRequest(rank=rank, lines=lines)
        call = self._stub.GetLogs(request, metadata=self._metadata, timeout=PLANNING_TIMEOUT_S)
        told = []
        try:
            while (one := await call.read()) is not grpc.aio.EOF:
                told.append({"rank": one.rank, "name": one.name, "lines": list(map(_plain_line, one.lines))})
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise bad_request(f"There is no rank {rank} in this ring.", "rank") from None
            raise from_rpc(error) from None
        return told

    def fail_all(self, reason: str, *, is_closing: bool = False) -> None:
        """Ends every running request with a 503 or an error event; when closing, refuses new ones."""
        if is_closing:
            self._closing = reason
        for generation in list(self.generations):
            generation.fail(reason)

    def doubt(self, reason: str) -> None:
        """A request broke: the ring is not taken for ok before the head says so anew."""
        if self.status is not None and self.status.status == "ok":
            doubted = head_pb2.ClusterStatus()
            doubted.CopyFrom(self.status)
            doubted.status, doubted.reason = "degraded", reason
            self.status = doubted

    async def _watch(self) -> None:
        num_failures = 0
        while True:
            call = self._stub.WatchCluster(head_pb2.ClusterRequest(), metadata=self._metadata)
            try:
                while (status := await call.read()) is not grpc.aio.EOF:
                    self.status = status
                    self._silent_s = 0.0
                    self._broken = ""
                    num_failures = 0
                self._broken = "it ended the connection"
            except grpc.aio.AioRpcError as error:
                self._broken = told = (error.details() or error.code().name).rstrip(".")
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    self._broken = connection_trouble(told)
                    if num_failures:
                        self._broken = await self._handshake_trouble(told) or self._broken
                if num_failures == 0:
                    logger.info("the watch on the head broke: %s", self._broken)
            finally:
                call.cancel()
            num_failures += 1
            await self._reopen_if_renewed()
            await asyncio.sleep(RETRY_S[min(num_failures, len(RETRY_S)) - 1])

    async def _handshake_trouble(self, details: str) -> str:
        return await asyncio.to_thread(
            handshake_trouble, self.address, self._credentials, "it", self._peer, details
        )

    async def _count_silence(self) -> None:
        loop = asyncio.get_running_loop()
        then_s = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = loop.time()
            self._silent_s += min(now_s - then_s, 2 * TICK_S)
            then_s = now_s
            if self._silent_s >= self._silence_limit_s + GRACE_S and self.generations:
                reason = self.trouble or f"The head has been silent for {self._silent_s:.1f} s."
                logger.warning("%d requests end: %s", len(self.generations), reason)
                self.fail_all(reason)


def _plain_line(line: control_pb2.LogLine) -> dict[str, Any]:
    return {
        "time_s": line.time_s,
        "level": line.level,
        "source": line.source,
        "message": line.message,
        "request_id": line.request_id or None,
    }
