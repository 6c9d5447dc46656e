"""All requests of the HTTP process to the head over one stream. Event loop only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from cluster.api.errors import ApiError, from_rpc, from_status, internal
from proto import head_pb2

_CODES = {code.value[0]: code for code in grpc.StatusCode}

Item = head_pb2.GenerateReply | ApiError
Inbox = asyncio.Queue[Item]


class HeadStream:
    """One Converse call. Where it ends, all that wait are told why, and `on_end()` is called once."""

    def __init__(self, call: Any, on_end: Callable[[], None]) -> None:
        self._call, self._on_end = call, on_end
        self._inboxes: dict[str, Inbox] = {}
        self._outbox: asyncio.Queue[head_pb2.Ask] = asyncio.Queue()
        self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    @property
    def num_waiting(self) -> int:
        return len(self._inboxes)

    def ask(self, request: head_pb2.GenerateRequest) -> Inbox:
        """Sends a request; its replies come there, after the last or a failure nothing more."""
        inbox: Inbox = asyncio.Queue()
        self._inboxes[request.request_id] = inbox
        self._outbox.put_nowait(head_pb2.Ask(generate=request))
        return inbox

    def leave(self, request_id: str, *, is_finished: bool) -> None:
        """Its rest is not wanted. Nothing happens where it had all."""
        if self._inboxes.pop(request_id, None) is not None:
            leave = head_pb2.CancelRequest(request_id=request_id, is_finished=is_finished)
            self._outbox.put_nowait(head_pb2.Ask(leave=leave))

    async def close(self) -> None:
        """Ends the call."""
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        failure = internal("The head ended the answer without a reason.")
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                for answer in message.answers:
                    self._take(answer)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(error)
        finally:
            for inbox in self._inboxes.values():
                inbox.put_nowait(failure)
            self._inboxes.clear()
            self._tasks[1].cancel()
            self._on_end()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader is told why
            while True:
                await self._call.write(await self._outbox.get())

    def _take(self, answer: head_pb2.Answer) -> None:
        inbox = self._inboxes.get(answer.request_id)
        if inbox is None:
            return  # it left
        if answer.code:
            inbox.put_nowait(from_status(_CODES[answer.code], answer.message))
        else:
            inbox.put_nowait(answer.reply)
        if answer.code or answer.reply.finish_reason:
            del self._inboxes[answer.request_id]
