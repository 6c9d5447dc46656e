"""Many requests of one caller over one stream: a frame's tokens wake one thread, and leave in one message."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

import grpc

from cluster.client import STATUS_CODES, Client, Item
from cluster.instructions import Emit, Fail, FailureKind, Score
from proto import head_pb2


class Conversation:
    """One Converse call. `submit(client, request)`, `leave(client)` and `ended(client)` are the head's."""

    def __init__(
        self,
        submit: Callable[[Client, head_pb2.GenerateRequest], None],
        leave: Callable[[Client], None],
        ended: Callable[[Client], None],
    ) -> None:
        self._submit, self._leave, self._ended = submit, leave, ended
        self._outbox: SimpleQueue[tuple[Client, Item] | head_pb2.Answer | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._clients: dict[str, Client] = {}
        self._is_over = False

    def listen(self, asks: Iterator[head_pb2.Ask]) -> None:
        """Take what the caller asks, until the stream ends; on a thread of its own."""
        try:
            for ask in asks:
                if ask.HasField("generate"):
                    self._open(ask.generate)
                elif ask.HasField("leave"):
                    self._close(ask.leave)
        except grpc.RpcError:
            pass  # the caller is gone
        self.close()

    def answers(self) -> Iterator[head_pb2.Answers]:
        """What there is for the caller, all at once that waits; on the handler's thread."""
        while (item := self._outbox.get()) is not None:
            message = head_pb2.Answers()
            while item is not None:
                if isinstance(item, head_pb2.Answer):
                    message.answers.append(item)
                else:
                    self._answer(message, *item)
                try:
                    item = self._outbox.get_nowait()
                except Empty:
                    break
            if message.answers:
                yield message
            if item is None:
                return

    def hang_up(self) -> None:
        """The head stops: the stream ends after what is there to be told. Any thread."""
        self._outbox.put(None)

    def close(self) -> None:
        """The caller left: no request of the stream goes on. Any thread, more than once."""
        with self._lock:
            self._is_over = True
            clients = tuple(self._clients.values())
        for client in clients:
            self._leave(client)
            self._end(client)
        self._outbox.put(None)

    def _open(self, request: head_pb2.GenerateRequest) -> None:
        client = Client.of(request, request.request_id, lambda who, item: self._outbox.put((who, item)))
        with self._lock:
            if self._is_over:
                return
            is_new = bool(request.request_id) and request.request_id not in self._clients
            if is_new:
                self._clients[request.request_id] = client
        if is_new:
            self._submit(client, request)
            return
        message = f"request id {request.request_id!r} is empty or already running; choose another"
        code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
        self._outbox.put(head_pb2.Answer(request_id=request.request_id, code=code, message=message))

    def _close(self, request: head_pb2.CancelRequest) -> None:
        with self._lock:
            client = self._clients.get(request.request_id)
        if client is not None:
            client.is_finished = request.is_finished
            self._leave(client)
            self._end(client)

    def _answer(self, message: head_pb2.Answers, client: Client, item: Item) -> None:
        if self._clients.get(client.request_id) is not client:
            return  # it left
        answer = message.answers.add(request_id=client.request_id)
        if isinstance(item, (Score, Emit)):
            answer.reply.CopyFrom(client.reply(item))
            if isinstance(item, Emit) and item.finish_reason:
                self._end(client)
            return
        failure = item or Fail(client.request_id, FailureKind.CANCELLED, "the request was cancelled")
        client.log.fail(failure)
        answer.code, answer.message = STATUS_CODES[failure.kind].value[0], failure.message
        self._end(client)

    def _end(self, client: Client) -> None:
        with self._lock:
            if self._clients.get(client.request_id) is not client:
                return
            del self._clients[client.request_id]
        self._ended(client)
