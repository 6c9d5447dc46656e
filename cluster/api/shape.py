"""What the endpoints' answers have in common, and the JSON of a stream's chunks. Pure."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

from cluster.api.choice import Delta
from cluster.api.errors import ApiError
from cluster.api.prompt import Prompt
from cluster.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's, not read again
    reasoning_tokens: int = 0  # of the completion's

    def content(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What the client wants to see of an answer."""

    is_streamed: bool = False
    has_usage: bool = False  # in a stream; otherwise it always comes
    has_token_ids: bool = False
    has_logprobs: bool = False
    num_top: int = 0


class Shape(ABC):
    """How an endpoint writes: `whole`; or `opening`, `delta`s and `closing` of each choice, then `end`."""

    keep_alive = b": keep-alive\n\n"  # what a silent stream gets: a comment, which clients skip

    @abstractmethod
    def opening(self, index: int, prompt: Prompt) -> str:
        """The first event of a choice; may be empty."""

    @abstractmethod
    def delta(self, index: int, delta: Delta) -> str:
        """Events with text."""

    @abstractmethod
    def closing(self, index: int, finish_reason: str, stop_string: str) -> str:
        """The event with the finish_reason; `stop_string` is the client's own that ended it, or empty."""

    @abstractmethod
    def end(self, usage: Usage) -> bytes:
        """A stream's last bytes."""

    @abstractmethod
    def whole(self, prompts: list[Prompt], answers: list[tuple[Delta, str]], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed; answers are (everything, finish_reason)."""

    def error(self, error: ApiError) -> bytes:
        """A stream's last bytes where it failed."""
        return error.event()


class ChunkShape(Shape):
    """What OpenAI's two older endpoints have in common: choices, and chunks of them."""

    object_name: str
    chunk_object: str

    def __init__(
        self, answer_id: str, created_s: int, model: str, options: AnswerOptions, tokenizer: Tokenizer
    ) -> None:
        self._head: dict[str, Any] = {
            "id": answer_id,
            "object": self.chunk_object,
            "created": created_s,
            "model": model,
        }
        self._options = options
        self._tokenizer = tokenizer
        self._before = "data: " + json.dumps(self._head)[:-1] + ', "choices": [{"index": '
        self._after = '}], "usage": null}\n\n' if options.has_usage else "}]}\n\n"

    @abstractmethod
    def _content(self, prompt: Prompt, delta: Delta) -> dict[str, Any]:
        """The text of a whole choice, under the endpoint's key."""

    @abstractmethod
    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        """The log-probabilities of its tokens."""

    def whole(self, prompts: list[Prompt], answers: list[tuple[Delta, str]], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, (prompt, (delta, finish_reason)) in enumerate(zip(prompts, answers, strict=True)):
            choice = {
                "index": index,
                **self._content(prompt, delta),
                "logprobs": self._logprobs(delta) if self._options.has_logprobs else None,
                "finish_reason": finish_reason,
            }
            if self._options.has_token_ids:
                choice["prompt_token_ids"] = prompt.tokens
                choice["token_ids"] = [token.id for token in delta.tokens]
            choices.append(choice)
        return self._head | {"object": self.object_name, "choices": choices, "usage": self._usage(usage)}

    def end(self, usage: Usage) -> bytes:
        """A stream's last bytes: the usage, where stream_options.include_usage asked for it."""
        if not self._options.has_usage:
            return DONE
        chunk = self._head | {"choices": [], "usage": self._usage(usage)}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n" + DONE

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return usage.content()

    def _chunk(self, index: int, fields: str) -> str:
        """One event; `fields` is JSON that follows the choice's index."""
        return f"{self._before}{index}, {fields}{self._after}"

    def _token_ids(self, delta: Delta) -> str:
        if not self._options.has_token_ids:
            return ""
        return f', "token_ids": {[token.id for token in delta.tokens]}'


def quote(text: str) -> str:
    """`text` as a JSON string, without the characters that some readers take for a line's end."""
    quoted = encode_basestring(text)
    if not quoted.isascii() and any(end in quoted for end in ("\u2028", "\u2029", "\x85")):
        return encode_basestring_ascii(text)
    return quoted
