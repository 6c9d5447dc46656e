"""One user of `macrame bench`: a completion of a fixed length, with the time of every arrival. Any thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, UserError

REQUEST_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Answer:
    """What came so far; written by one thread while others read. Times in s by time.perf_counter()."""

    num_prompt: int
    sent_at: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when so many tokens came together
    is_whole: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


class Endpoint:
    """The ring's HTTP address, with its key."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url} is not an HTTP address; write it as http://host:port", EXIT_ERROR)
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._answering: set[socket.socket] = set()
        self.url = url

    def get(self, path: str) -> Any:
        """The JSON at `path`; raises UserError."""
        connection = self._connect()
        try:
            return json.loads(self._send(connection, "GET", path, None).read())
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        except ValueError as error:
            raise UserError(f"{self.url}{path} is not macrame's API; give the head's with --url") from error
        finally:
            connection.close()

    def complete(self, prompt: Sequence[int], num_tokens: int, answer: Answer | None = None) -> Answer:
        """Streams one completion of exactly `num_tokens` into `answer`. Raises UserError."""
        answer = answer or Answer(len(prompt))
        body = {
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        connection, own = self._connect(), None
        answer.sent_at = time.perf_counter()
        try:
            connection.connect()
            own = connection.sock
            with self._lock:
                self._answering.add(own)
            for event in _events(self._send(connection, "POST", "/v1/completions", body)):
                if "error" in event:
                    raise UserError(f"the ring failed: {event['error'].get('message')}", EXIT_ERROR)
                new = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
                if new:
                    answer.arrivals.append((time.perf_counter(), new))
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            with self._lock:
                self._answering.discard(own)
            connection.close()
        if answer.num_tokens != num_tokens:
            raise UserError(f"asked for {num_tokens} tokens and got {answer.num_tokens}", EXIT_ERROR)
        answer.is_whole = True
        return answer

    def leave(self) -> None:
        """Breaks off every answer that is under way, which cancels it on every stage."""
        with self._lock:
            for own in self._answering:
                with contextlib.suppress(OSError):
                    own.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=REQUEST_TIMEOUT_S)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]["message"]
            raise UserError(f"{self.url}{path} answers {response.status}: {text[:300]}", EXIT_ERROR)
        return response

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.url} does not answer ({error}); is the ring running?", EXIT_UNREACHABLE)


def _events(response: http.client.HTTPResponse) -> Iterable[Any]:
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])
