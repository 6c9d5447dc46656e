"""A small client of macrame's own HTTP API, on the standard library alone. Any thread, one at a time."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE, UserError

CONNECT_TIMEOUT_S = 5.0
MAX_EVENT_BYTES = 16 << 20
_WRONG_REQUEST = (400, 404, 413, 422)  # with a sentence: what was asked for is wrong, such as a model
NOT_OURS = "it is not macrame's API"


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
                raise _refused(self, reply.status, content)
            return content

    def post(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The JSON object that answers `body`. Raises UserError, also for silence of `timeout_s`."""
        with self._reply("POST", path, body, timeout_s) as reply:
            content = _object(reply.read())
            if reply.status != 200 or not content:
                raise _refused(self, reply.status, content)
            return content

    def models(self) -> list[str]:
        """The ids that a request may name: the served model, then its adapters."""
        try:
            return [str(model["id"]) for model in self.get("/v1/models")["data"]]
        except (KeyError, TypeError):
            raise _refused(self, 200, {}) from None

    def cluster(self) -> dict[str, Any]:
        """/v1/cluster. Raises UserError also for another program's API."""
        content = self.get("/v1/cluster")
        if "status" not in content or "nodes" not in content:
            raise _refused(self, 200, {})
        return content

    def model(self) -> str:
        """The id of the served model."""
        models = self.models()
        if not models:
            raise UserError(f"{self.url} serves no model")
        return models[0]

    def stream(
        self, path: str, body: dict[str, Any], timeout_s: float
    ) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer as they come; leaving the iterator cancels the answer.

        Raises UserError for an error event, a stream without [DONE], and silence of `timeout_s`.
        """
        with self._reply("POST", path, body, timeout_s) as reply:
            if reply.status != 200:
                raise _refused(self, reply.status, _object(reply.read()))
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


def _refused(client: Client, status: int, content: dict[str, Any]) -> UserError:
    if status == 401:
        problem = "does not accept this API key" if client.key else "wants an API key"
        return UserError(
            f"{client.url} {problem}: set MACRAME_API_KEYS to one of its keys, or name the ring's cluster "
            "file with --config",
            EXIT_USAGE,
        )
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    is_ours_to_mend = status in _WRONG_REQUEST and message is not None
    return UserError(
        f"{client.url} answers {status}: {message or NOT_OURS}", EXIT_USAGE if is_ours_to_mend else EXIT_ERROR
    )
