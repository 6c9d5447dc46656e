"""The JSON of Anthropic's Messages API (docs.anthropic.com/en/api/messages, messages-streaming). Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from cluster.api.choice import Delta
from cluster.api.errors import ApiError
from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part, Reasoning
from cluster.api.prompt import Prompt
from cluster.api.shape import Shape, Usage

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesShape(Shape):
    """One message of content blocks: text, thinking, tool_use. A block ends where the next one begins."""

    keep_alive = b'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(
        self,
        answer_id: str,
        model: str,
        num_prompt_tokens: int,
        request_id: str,
        *,
        is_thinking_shown: bool = True,
        is_context_limit: bool = False,
    ) -> None:
        """`is_context_limit`: the answer may have fewer tokens than were asked for, to the context's end."""
        self._head = {"id": answer_id, "type": "message", "role": "assistant", "model": model}
        self._num_prompt_tokens = num_prompt_tokens
        self._request_id = request_id
        self._is_thinking_shown = is_thinking_shown
        self._is_context_limit = is_context_limit
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the last block: its text, or its input's JSON
        self._is_open = False
        self._stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}

    def opening(self, index: int, prompt: Prompt) -> str:
        message: dict[str, Any] = {**self._head, "content": [], **self._stop, "usage": self._usage(0)}
        return _event("message_start", message=message)

    def delta(self, index: int, delta: Delta) -> str:
        return self._written(delta.as_parts())

    def closing(self, index: int, finish_reason: str, stop_string: str) -> str:
        reason = _STOP_REASONS[finish_reason]
        if stop_string:
            reason = "stop_sequence"
        elif finish_reason == "length" and self._is_context_limit:
            reason = "model_context_window_exceeded"
        self._stop = {"stop_reason": reason, "stop_sequence": stop_string or None}
        return self._close()

    def end(self, usage: Usage) -> bytes:
        delta = _event(
            "message_delta", delta=self._stop, usage=self._usage(usage.completion_tokens, usage.cached_tokens)
        )
        return (delta + _event("message_stop")).encode()

    def whole(self, prompts: list[Prompt], answers: list[tuple[Delta, str]], usage: Usage) -> dict[str, Any]:
        ((delta, finish_reason),) = answers
        self._written(delta.as_parts())
        self.closing(0, finish_reason, delta.stop_string)
        used = self._usage(usage.completion_tokens, usage.cached_tokens)
        return {**self._head, "content": self._blocks, **self._stop, "usage": used}

    def error(self, error: ApiError) -> bytes:
        content = error.anthropic_content(self._request_id)
        return f"event: error\ndata: {json.dumps(content)}\n\n".encode()

    def _usage(self, num_tokens: int, num_cached: int = 0) -> dict[str, int]:
        """num_cached: of the prompt's tokens, not read again; Anthropic counts them apart from the others."""
        return {
            "input_tokens": self._num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": num_tokens,
        }

    # -- blocks -------------------------------------------------------------------------------------------
    def _written(self, parts: Iterable[Part]) -> str:
        return "".join([self._part(part) for part in parts])

    def _part(self, part: Part) -> str:
        match part:
            case Content(text):
                return self._in("text", {"text": ""}) + self._grow(text, "text_delta", "text")
            case Reasoning(text):
                began = self._in("thinking", {"thinking": "", "signature": ""})
                return began + self._grow(
                    text if self._is_thinking_shown else "", "thinking_delta", "thinking"
                )
            case CallStart(_, call_id, name):
                return self._close() + self._begin("tool_use", {"id": call_id, "name": name, "input": {}})
            case CallArguments(_, text):
                return self._grow(text, "input_json_delta", "partial_json")
            case CallEnd():
                return self._close()

    def _in(self, kind: str, fields: dict[str, Any]) -> str:
        """Begins a block of this kind unless it is the one that is open."""
        if self._is_open and self._blocks[-1]["type"] == kind:
            return ""
        return self._close() + self._begin(kind, fields)

    def _begin(self, kind: str, fields: dict[str, Any]) -> str:
        block = {"type": kind, **fields}
        self._blocks.append(block)
        self._is_open = True
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _grow(self, text: str, kind: str, field: str) -> str:
        if not text:
            return ""
        self._pieces.append(text)
        delta = {"type": kind, field: text}
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> str:
        if not self._is_open:
            return ""
        block, text = self._blocks[-1], "".join(self._pieces)
        self._pieces.clear()
        self._is_open = False
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[block["type"]] = text
        return _event("content_block_stop", index=len(self._blocks) - 1)


def model_info(name: str, created_s: int, context: int | None) -> dict[str, Any]:
    """A model as /v1/models tells it to Anthropic's clients (docs.anthropic.com/en/api/models-list)."""
    created_at = datetime.fromtimestamp(created_s, UTC).isoformat().replace("+00:00", "Z")
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created_at,
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def _object(text: str) -> dict[str, Any]:
    """A call's arguments; empty where the answer ended within them."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"
