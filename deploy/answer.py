"""One streamed answer of a ring, piece by piece, and what it took. One thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from deploy.client import Client

SILENCE_LIMIT_S = 600.0  # a long prompt on a slow ring gives its first token late
MIN_TIMED_S = 0.002  # text that was held back comes at once with what follows: less tells nothing of speed


@dataclass(frozen=True, slots=True)
class Timing:
    """One streamed answer. Times in s."""

    num_tokens: int
    first_s: float  # from the request to the first text
    total_s: float

    @property
    def tok_s(self) -> float:
        """Tokens after the first over the time after the first; 0 where they came with the first."""
        after_first_s = self.total_s - self.first_s
        is_timed = self.num_tokens > 1 and after_first_s >= MIN_TIMED_S
        return (self.num_tokens - 1) / after_first_s if is_timed else 0.0

    def __str__(self) -> str:
        speed = f", {self.tok_s:.1f} tokens/s" if self.tok_s else ""
        return f"{self.num_tokens} tokens{speed}, first token after {self.first_s * 1e3:.0f} ms"


class Answer:
    """Sends a body and hands on what comes; its fields grow meanwhile, and stand when it breaks off too."""

    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        """body: without `stream`; without `model`, the served one is asked for."""
        self._client, self._body = client, body
        self.finish_reason = ""
        self.num_prompt_tokens = 0
        self._num_tokens, self._num_pieces = 0, 0
        self._first_s, self._last_s = 0.0, 0.0

    @property
    def timing(self) -> Timing:
        """So far; of an answer that broke off, its pieces stand for tokens."""
        is_one_piece = self._num_pieces < 2  # it came all at once: that says nothing of speed
        last_s = self._first_s if is_one_piece else self._last_s
        return Timing(self._num_tokens or self._num_pieces, self._first_s, last_s)

    def run(self, write: Callable[[str], None], write_reasoning: Callable[[str], None] | None = None) -> None:
        """Until the answer ends. Raises UserError; leaving it by an exception cancels the answer."""
        path = "/v1/chat/completions" if "messages" in self._body else "/v1/completions"
        model = {} if "model" in self._body else {"model": self._client.model()}
        whole = {**model, **self._body, "stream": True, "stream_options": {"include_usage": True}}
        begin = time.perf_counter()
        with closing(self._client.stream(path, whole, SILENCE_LIMIT_S)) as events:
            for event in events:
                if event.get("usage"):
                    self._num_tokens = event["usage"]["completion_tokens"]
                    self.num_prompt_tokens = event["usage"].get("prompt_tokens", 0)
                for choice in event.get("choices", ()):
                    self._take(choice, time.perf_counter() - begin, write, write_reasoning)

    def _take(
        self,
        choice: dict[str, Any],
        now_s: float,
        write: Callable[[str], None],
        write_reasoning: Callable[[str], None] | None,
    ) -> None:
        delta = choice.get("delta") or {}
        text = choice["text"] if "text" in choice else delta.get("content")
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if text or reasoning or choice.get("finish_reason"):
            self._last_s = now_s
            self._first_s = self._first_s or now_s
        self._num_pieces += bool(text or reasoning)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if reasoning and write_reasoning is not None:
            write_reasoning(reasoning)
        if text:
            write(text)


def stream_answer(client: Client, body: dict[str, Any], write: Callable[[str], None]) -> Timing:
    """Sends `body` (without stream) to the endpoint that fits and writes the text as it comes."""
    answer = Answer(client, body)
    answer.run(write)
    return answer.timing
