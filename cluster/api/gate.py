"""What every HTTP request passes first: API keys, the Host header, counting. Event loop only."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api import access
from cluster.api.assets import is_asset
from cluster.api.errors import ApiError
from cluster.api.metrics import Metrics

OPEN_PATHS = ("/health",)
MESSAGES = "/v1/messages"
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


class Gate:
    """Lets a request through to `app`, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._metrics = metrics
        self._paths = paths
        self._host_names = {"", "localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # as nginx counts clients that left before the first byte
        headers = Headers(scope=scope)
        note = access.begin(headers)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                access.sign(message, note, is_anthropic=speaks_anthropic(scope))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            refusal = self._refusal(scope["path"], headers)
            app = self._app if refusal is None else error_response(refusal, scope)
            await app(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.in_flight.dec()
            access.log(scope, status, note, self._paths)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if not self._keys:
            return None if self._is_local(headers.get("host", "")) else _foreign_host()
        if path in OPEN_PATHS or is_asset(path) or self._has_key(headers):
            return None
        return ApiError(
            401,
            "The API key is missing or wrong: send the header `Authorization: Bearer KEY` "
            "(or `x-api-key: KEY`).",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _has_key(self, headers: Headers) -> bool:
        """In either header: a client of Anthropic's API may send both, of which one is another service's."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        bearer = given.strip() if scheme.lower() == "bearer" else ""
        given_keys = [text.encode() for text in (bearer, headers.get("x-api-key", "").strip())]
        found = [hmac.compare_digest(one, key) for key in self._keys for one in given_keys]
        return any(found)

    def _is_local(self, host: str) -> bool:
        """Without keys only names of this machine pass: a web page may point its own name at 127.0.0.1."""
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        if name in self._host_names or name.endswith(_LOCAL_SUFFIXES):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the client of this request expects Anthropic's shapes."""
    path: str = scope["path"]
    return path == MESSAGES or path.startswith(f"{MESSAGES}/") or "anthropic-version" in Headers(scope=scope)


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """An error as JSON, in the shape of the request's dialect."""
    content = error.content()
    if speaks_anthropic(scope):
        note = access.current_note.get(None)
        content = error.anthropic_content(None if note is None else note.request_id)
    return JSONResponse(content, error.status, headers=error.headers)


def _foreign_host() -> ApiError:
    return ApiError(
        403,
        "The Host header is no name of this machine; set API keys (MACRAME_API_KEYS) to serve other names.",
        code="host_not_allowed",
    )
