"""One request that waits at the head for its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from cluster.instructions import Emit, Fail, FailureKind, Score
from cluster.log_line import checked_id
from cluster.request_log import RequestLog
from proto import head_pb2

Item = Score | Emit | Fail | None  # None: the client left

STATUS_CODES = {
    FailureKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.LATE: grpc.StatusCode.DEADLINE_EXCEEDED,
    FailureKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.FAILED: grpc.StatusCode.INTERNAL,
    FailureKind.CANCELLED: grpc.StatusCode.CANCELLED,
}


@dataclass(slots=True, eq=False)
class Client:
    """`put` takes what there is for it, on any thread, and never blocks."""

    request_id: str
    put: Callable[[Item], object]
    log: RequestLog
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0  # its first chunk entered the ring
    is_gone: bool = False
    is_finished: bool = False  # it has all it wanted, before the last token
    _first_ms: float = 0.0

    @classmethod
    def of(
        cls, request: head_pb2.GenerateRequest, request_id: str, put: Callable[[Client, Item], object]
    ) -> Client:
        """Who sent this request."""
        log = RequestLog(checked_id(request.trace_id or request_id), len(request.prompt))
        client = cls(request_id, lambda item: put(client, item), log)  # the client that is made here
        return client

    def reply(self, item: Score | Emit) -> head_pb2.GenerateReply:
        """What it is told of a token, or of its prompt; called once for each, in their order."""
        if isinstance(item, Score):
            return head_pb2.GenerateReply(prompt=item.tokens)
        reply = head_pb2.GenerateReply(finish_reason=item.finish_reason, vector=item.vector)
        if not item.vector:
            reply.tokens.append(item.token)
        if item.num_completion == 1 or item.finish_reason:
            if item.num_completion == 1 or item.vector:
                self._first_ms = (time.monotonic() - self.started_at) * 1e3
                self.log.first_s = 0.0 if item.vector else self._first_ms / 1e3
            reply.prompt_tokens, reply.completion_tokens = item.num_prompt, item.num_completion
            reply.cached_tokens = item.num_cached
            reply.queue_ms = (self.started_at - self.submitted_at) * 1e3
            reply.prefill_ms = self._first_ms
        if item.finish_reason:
            self.log.finish(item)
        return reply
