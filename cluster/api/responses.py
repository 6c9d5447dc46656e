"""The JSON of OpenAI's Responses API (platform.openai.com/docs/api-reference/responses, -streaming). Pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.api.choice import Delta
from cluster.api.errors import ApiError
from cluster.api.logprobs import TokenLogprobs
from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part, Reasoning
from cluster.api.prompt import Prompt
from cluster.api.shape import Shape, Usage

# What each kind of item with text is made of: its part, and the names of the events of the text.
_PARTS = {
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}
_ARGUMENTS = "response.function_call_arguments"
_ITEM_IDS = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ResponsesShape(Shape):
    """One response of items: reasoning, message, function_call. An item ends where the next one begins.

    `response` is what the response says of its request; `logprobs`, where they are asked for, tells those of
    the text's tokens.
    """

    def __init__(self, response: Mapping[str, Any], logprobs: TokenLogprobs | None = None) -> None:
        self._response = response
        self._token_logprobs = logprobs
        self._items: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []  # likewise
        self._is_open = False
        self._num_events = 0
        self._is_cut = False

    def opening(self, index: int, prompt: Prompt) -> str:
        response = self._told("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, index: int, delta: Delta) -> str:
        return self._written(delta.as_parts())

    def closing(self, index: int, finish_reason: str, stop_string: str) -> str:
        self._is_cut = finish_reason == "length"
        return self._close(is_complete=not self._is_cut)

    def end(self, usage: Usage) -> bytes:
        response = self._finished(usage)
        return self._event(f"response.{response['status']}", response=response).encode()

    def whole(self, prompts: list[Prompt], answers: list[tuple[Delta, str]], usage: Usage) -> dict[str, Any]:
        ((delta, finish_reason),) = answers
        self._written(delta.as_parts())
        self.closing(0, finish_reason, delta.stop_string)
        return self._finished(usage)

    def error(self, error: ApiError) -> bytes:
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", **fields, **error.content()).encode()

    def _told(self, status: str) -> dict[str, Any]:
        return {**self._response, "status": status, "output": self._items, "usage": None}

    def _finished(self, usage: Usage) -> dict[str, Any]:
        response = self._told("incomplete" if self._is_cut else "completed")
        if self._is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response | {
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        }

    # -- items --------------------------------------------------------------------------------------------
    def _written(self, parts: Iterable[Part]) -> str:
        return "".join([self._part(part) for part in parts])

    def _part(self, part: Part) -> str:
        match part:
            case Content(text):
                began = self._in("message", {"role": "assistant", "content": []})
                logprobs = self._token_logprobs.entries(part.tokens) if self._token_logprobs else []
                self._logprobs += logprobs
                return began + self._grow(text, logprobs=logprobs)
            case Reasoning(text):
                return self._in("reasoning", {"summary": [], "content": []}) + self._grow(text)
            case CallStart(_, call_id, name):
                fields = {"call_id": call_id, "name": name, "arguments": ""}
                return self._close() + self._begin("function_call", fields)
            case CallArguments(_, text):
                self._pieces.append(text)
                return self._event(f"{_ARGUMENTS}.delta", **self._place, delta=text)
            case CallEnd(_, is_complete):
                return self._close(is_complete=is_complete)

    def _in(self, kind: str, fields: dict[str, Any]) -> str:
        """Begins an item of this kind, with its one part, unless it is the one that is open."""
        if self._is_open and self._items[-1]["type"] == kind:
            return ""
        began = self._close() + self._begin(kind, fields)
        return began + self._event(
            "response.content_part.added", **self._place, content_index=0, part=_text_part(kind, "", [])
        )

    def _begin(self, kind: str, fields: dict[str, Any]) -> str:
        item = {"id": _ITEM_IDS[kind] + uuid.uuid4().hex, "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._is_open = True
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _grow(self, text: str, **fields: Any) -> str:
        self._pieces.append(text)
        name = _PARTS[self._items[-1]["type"]][1]
        return self._event(f"{name}.delta", **self._place, content_index=0, delta=text, **fields)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _close(self, *, is_complete: bool = True) -> str:
        if not self._is_open:
            return ""
        item, place, text = self._items[-1], self._place, "".join(self._pieces)
        kind = item["type"]
        self._pieces.clear()
        self._is_open = False
        item["status"] = "completed" if is_complete else "incomplete"
        if kind == "function_call":
            item["arguments"] = text
            done = self._event(f"{_ARGUMENTS}.done", **place, name=item["name"], arguments=text)
        else:
            logprobs, self._logprobs = self._logprobs, []
            part = _text_part(kind, text, logprobs)
            item["content"] = [part]
            more: dict[str, Any] = {"logprobs": logprobs} if kind == "message" else {}
            done = self._event(f"{_PARTS[kind][1]}.done", **place, content_index=0, text=text, **more)
            done += self._event("response.content_part.done", **place, content_index=0, part=part)
        return done + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _event(self, kind: str, **fields: Any) -> str:
        content = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {json.dumps(content)}\n\n"


def _text_part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": logprobs} if kind == "message" else {}
    return {"type": _PARTS[kind][0], "text": text, **more}
