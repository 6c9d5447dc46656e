"""Every error of the HTTP side, in OpenAI's shape and in Anthropic's. Pure."""

from __future__ import annotations

import json
from typing import Any

import grpc

RETRY_AFTER_S = 1
LATE_RETRY_AFTER_S = 10  # a queue in which a request waited in vain is not short a second later
# docs.anthropic.com/en/api/errors; any other status is an api_error.
_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# What gRPC itself says when a peer goes away; anything else is the head's own sentence.
_TRANSPORT_FAILURES = (
    "Socket closed",
    "failed to connect",
    "recvmsg",
    "Connection reset",
    "Stream removed",
    "GOAWAY",
)

_OWN_DEADLINE = "Deadline Exceeded"


class ApiError(Exception):
    """An error for the client: an HTTP status and what OpenAI's error object holds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def content(self) -> dict[str, Any]:
        """The response body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic_content(self, request_id: str | None) -> dict[str, Any]:
        """The response body for a client of Anthropic's API."""
        kind = _ANTHROPIC_KINDS.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}

    def event(self) -> bytes:
        """The last event of a stream that had begun."""
        return b"data: " + json.dumps(self.content()).encode() + b"\n\n"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str = "unavailable", retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(503, message, kind="service_unavailable_error", code=code, headers=headers)


def internal(message: str = "The server failed while it worked on this request.") -> ApiError:
    return ApiError(500, message, kind="server_error", code="internal_error")


def from_rpc(error: grpc.aio.AioRpcError) -> ApiError:
    """What a failed call of the head means for the client."""
    return from_status(error.code(), error.details() or "")


def from_status(code: grpc.StatusCode, details: str) -> ApiError:
    """What it means that the head refused a request, or failed on it."""
    details = details or "The head gave no reason."
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_TRANSPORT_FAILURES):
        return unavailable(f"The connection to the head broke ({details.partition(':')[0]}).")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return bad_request(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ApiError(
            429,
            details,
            kind="rate_limit_error",
            code="queue_full",
            headers={"retry-after": str(RETRY_AFTER_S)},
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details != _OWN_DEADLINE:  # the head's
        return unavailable(details, "queue_timeout", LATE_RETRY_AFTER_S)
    if code is grpc.StatusCode.UNAVAILABLE:
        return unavailable(details)
    return internal(details)
