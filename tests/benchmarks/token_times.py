"""A client of the HTTP endpoint that notes when each token of a stream came."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer; times are those of time.perf_counter()."""

    asked_at: float
    times: tuple[float, ...]  # of each token

    @property
    def first_s(self) -> float:
        """From the request to the first token."""
        return self.times[0] - self.asked_at

    @property
    def tok_s(self) -> float:
        """Tokens after the first over the time after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def stream_tokens(url: str, prompt: Sequence[int], num_tokens: int) -> Stream:
    """An answer of exactly `num_tokens`; raises RuntimeError for any other."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300.0)
    body = {
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    times: list[float] = []
    try:
        asked_at = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                for choice in json.loads(line[6:]).get("choices", ()):
                    times.extend([now] * len(choice.get("token_ids") or ()))
    finally:
        connection.close()
    if len(times) != num_tokens:
        raise RuntimeError(f"asked for {num_tokens} tokens and got {len(times)} (status {response.status})")
    return Stream(asked_at, tuple(times))
