"""From a body of OpenAI's Responses API to the chat that it is. Pure.

A turn of the assistant is several items there (reasoning, message, function_call) and one message in a chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.api.dialect import (
    CACHE_MARKS,
    UNREAD,
    Mentions,
    effort_fields,
    function_call,
    function_tool,
    items,
    refuse_others,
    string,
    unsupported,
    wrong_kind,
)
from cluster.api.errors import bad_request
from cluster.api.responses_body import ResponsesBody

DEFAULT_EFFORT = "medium"  # what no effort means
_ROLES = ("user", "assistant", "system", "developer")
_LEADING = ("system", "developer")  # what stands first is joined: many templates allow one such message
_ITEM_FIELDS = {
    "message": ("type", "id", "status", "phase", "role", "content"),
    "reasoning": ("type", "id", "status", "summary", "content"),
    "function_call": ("type", "id", "status", "call_id", "name", "arguments"),
    "function_call_output": ("type", "id", "status", "call_id", "output"),
}
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_REASONING_TEXTS = {"reasoning_text": "text", "summary_text": "text"}
_PART_FIELDS = ("type", "text", "refusal", "logprobs", *UNREAD)
_TOOL_FIELDS = ("type", "name", "description", "parameters", "strict", *CACHE_MARKS)


def to_chat(body: ResponsesBody, mentions: Mentions) -> dict[str, Any]:
    """The same as a body of /v1/chat/completions; raises ApiError that names this API's fields."""
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "priority": body.priority,
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if body.has_logprobs:  # top_logprobs alone gives none, as at OpenAI
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.tools:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(items(body.tools, "tools"))]
    if body.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(body.tool_choice)
    if body.text is not None and body.text.format is not None:
        chat["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        chat |= effort_fields(body.reasoning.effort, "reasoning.effort", DEFAULT_EFFORT, mentions)
    return {name: value for name, value in chat.items() if value is not None}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    given = body.input
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(items(given, "input")):
        _add(item, f"input[{i}]", messages)
    return messages


def _add(item: dict[str, Any], place: str, messages: list[dict[str, Any]]) -> None:
    """One item, as a message or as part of the last one."""
    kind = item.get("type", "message" if "role" in item else None)
    if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
        raise wrong_kind(place, kind, tuple(_ITEM_FIELDS))
    if kind == "reasoning" and not (item.get("content") or item.get("summary")):
        if item.get("encrypted_content"):
            raise unsupported(f"{place}.encrypted_content", ": only who wrote it can read it")
        return
    refuse_others(item, (*_ITEM_FIELDS[kind], "encrypted_content", *CACHE_MARKS), place)
    if kind == "message":
        _add_message(item, place, messages)
    elif kind == "function_call_output":
        call_id = string(item, "call_id", place)
        text = _text(item.get("output"), f"{place}.output", _TEXTS)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
    elif kind == "function_call":
        call = function_call(
            string(item, "call_id", place), string(item, "name", place), _arguments(item, place)
        )
        _turn(messages).setdefault("tool_calls", []).append(call)
    else:
        turn = _turn(messages)
        if turn["content"] or "tool_calls" in turn:  # a turn begins with its reasoning
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        name = "content" if item.get("content") else "summary"
        text = _text(item[name], f"{place}.{name}", _REASONING_TEXTS)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text


def _add_message(item: dict[str, Any], place: str, messages: list[dict[str, Any]]) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise bad_request(
            f"{place}.role must be one of {', '.join(_ROLES)}.", f"{place}.role", "invalid_value"
        )
    text = _text(item.get("content"), f"{place}.content", _TEXTS)
    if role == "assistant":
        turn = _turn(messages)
        if turn["content"] or "tool_calls" in turn:
            messages.append({"role": "assistant", "content": text})
        else:
            turn["content"] = text
    elif role in _LEADING and len(messages) == 1 and messages[0]["role"] in _LEADING:
        messages[0]["content"] += f"\n\n{text}"
    else:
        messages.append({"role": role, "content": text})


def _arguments(item: dict[str, Any], place: str) -> str:
    text = string(item, "arguments", place)
    try:
        is_object = isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise bad_request(
            f"{place}.arguments must be the text of a JSON object.", f"{place}.arguments", "invalid_value"
        )
    return text


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that the next item belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any, place: str, kinds: Mapping[str, str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{place} must be a text or a list of parts.", place, "invalid_value")
    texts = []
    for i, part in enumerate(content):
        here = f"{place}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise wrong_kind(here, kind, tuple(kinds))
        refuse_others(part, _PART_FIELDS, here)
        texts.append(string(part, kinds[kind], here))
    return "".join(texts)


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise wrong_kind(place, tool.get("type"), ("function",))
    given = {**tool, "parameters": tool.get("parameters") or {"type": "object", "properties": {}}}
    return function_tool(given, place, "parameters", _TOOL_FIELDS)


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return _named(choice, "tool_choice")
    if kind != "allowed_tools":
        raise wrong_kind("tool_choice", kind, ("function", "allowed_tools"))
    place = "tool_choice.tools"
    tools = [_named(tool, f"{place}[{i}]") for i, tool in enumerate(items(choice.get("tools"), place))]
    return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}


def _named(tool: dict[str, Any], place: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": string(tool, "name", place)}}


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    schema = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}
