"""A small client of macrame's own HTTP API, on the standard library alone. Any thread, one at a time."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError

CONNECT_TIMEOUT_S = 5.0
MAX_EVENT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to one API. Every failure is a UserError; exit code 4 where nobody answers."""

    host: str
    port: int
    key: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`; a status of 503 is an answer too (/health)."""
        with self._reply("GET", path, None, CONNECT_TIMEOUT_S) as reply:
            content = _object(reply.read())
            if reply.status not in (200, 503) or (reply.status == 503 and "error" in content):
                raise _refused(self.url, reply.status, content)
            return content

    def model(self) -> str:
        """The id of the served model."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer as they come; leaving the iterator cancels the answer.

        Raises UserError for an error event, a stream without [DONE], and silence of `timeout_s`.
        """
        with self._reply("POST", path, body, timeout_s) as reply:
            if reply.status != 200:
                raise _refused(self.url, reply.status, _object(reply.read()))
            while line := reply.readline(MAX_EVENT_BYTES):
                if not line.startswith(b"data: "):
                    continue
                data = line[len(b"data: ") :].strip()
                if data == b"[DONE]":
                    return
                event = _object(data)
                if "error" in event:
                    raise UserError(f"the answer broke off: {event['error'].get('message')}", EXIT_ERROR)
                yield event
        raise UserError(f"{self.url} closed the stream before the end of the answer", EXIT_ERROR)

    @contextmanager
    def _reply(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            yield connection.getresponse()
        except TimeoutError:
            raise UserError(f"{self.url} has been silent for {timeout_s:.0f} s", EXIT_UNREACHABLE) from None
        except (OSError, http.client.HTTPException) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise UserError(
                f"{self.url} does not answer ({reason}); is the ring running?", EXIT_UNREACHABLE
            ) from None
        finally:
            connection.close()


def _object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _refused(url: str, status: int, content: dict[str, Any]) -> UserError:
    message = content.get("error", {}).get("message") or "it is not macrame's API"
    return UserError(f"{url} answers {status}: {message}", EXIT_ERROR)
