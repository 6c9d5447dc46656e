"""From a body of Anthropic's Messages API to the chat that it is. Pure.

Everything that the answer depends on is carried over or refused by name; `cache_control` is neither, because
a cache changes no token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.api.dialect import (
    Mentions,
    effort_fields,
    function_call,
    function_tool,
    items,
    refuse_others,
    string,
    switch_thinking,
    wrong_kind,
)
from cluster.api.errors import bad_request
from cluster.api.messages_body import MessagesBody, ToolChoice

DEFAULT_EFFORT = "high"  # what no effort means

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}
_BLOCK_FIELDS = {
    "text": ("type", "cache_control", "text", "citations"),
    "thinking": ("type", "cache_control", "thinking", "signature"),
    "tool_use": ("type", "cache_control", "id", "name", "input", "caller"),
    "tool_result": ("type", "cache_control", "tool_use_id", "content", "is_error"),
}
_TOOL_FIELDS = (
    *("type", "name", "description", "input_schema", "strict"),
    *("cache_control", "eager_input_streaming"),
)

Block = tuple[str, dict[str, Any], str]  # type, block, place


def to_chat(body: MessagesBody, mentions: Mentions) -> dict[str, Any]:
    """The same as a body of /v1/chat/completions; raises ApiError that names Anthropic's fields."""
    messages = _messages(body)
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "stream": body.stream,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "priority": body.priority,
    }
    if messages[-1]["role"] == "assistant":  # the answer goes on from there
        if "tool_calls" in messages[-1]:
            place = f"messages[{len(body.messages) - 1}]"
            raise bad_request(f"{place}: tool_use needs a tool_result in the next message.", place)
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(items(body.tools, "tools"))]
    if body.tool_choice is not None:
        chat |= _tool_choice(body.tool_choice)
    arguments = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        arguments = switch_thinking(body.thinking.type != "disabled", mentions) | arguments
    config = body.output_config
    if config is not None and config.effort is not None:
        place = "output_config.effort"
        chat |= effort_fields(config.effort, place, DEFAULT_EFFORT, mentions)
    if config is not None and config.format is not None:
        schema = {"name": "output", "schema": config.format.schema_, "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    chat["chat_template_kwargs"] = arguments or None
    return {name: value for name, value in chat.items() if value is not None}


def _messages(body: MessagesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system is not None and (system := _text(body.system, "system")):
        messages.append({"role": "system", "content": system})
    for i, message in enumerate(items(body.messages, "messages")):
        messages += _message(message, f"messages[{i}]")
    return messages


def _message(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The messages of a chat that one of these is: each tool's result is one of its own there."""
    refuse_others(message, ("role", "content"), place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _BLOCKS:
        raise bad_request(
            f"{place}.role must be one of {', '.join(_BLOCKS)}.", f"{place}.role", "invalid_value"
        )
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = _blocks(content, f"{place}.content", _BLOCKS[role])
    return [_assistant(blocks)] if role == "assistant" else _said(role, blocks)


def _blocks(content: Any, place: str, kinds: tuple[str, ...]) -> Iterator[Block]:
    """Each block of a list; raises ApiError for another type or field."""
    if not isinstance(content, list):
        raise bad_request(f"{place} must be a text or a list of blocks.", place, "invalid_value")
    for i, block in enumerate(content):
        here = f"{place}[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise wrong_kind(here, kind, kinds)
        refuse_others(block, _BLOCK_FIELDS[kind], here)
        yield kind, block, here


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(string(block, "text", here) for _, block, here in _blocks(content, place, ("text",)))


def _said(role: str, blocks: Iterable[Block]) -> list[dict[str, Any]]:
    """What the user or the system said, with tools' results between."""
    messages: list[dict[str, Any]] = []
    for kind, block, place in blocks:
        if kind == "text":
            text = string(block, "text", place)
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += text
            else:
                messages.append({"role": role, "content": text})
            continue
        content = block.get("content")
        text = "" if content is None else _text(content, f"{place}.content")
        if block.get("is_error"):  # a chat has no other place for it
            text = f"Error: {text}"
        call_id = string(block, "tool_use_id", place)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
    return messages or [{"role": role, "content": ""}]


def _assistant(blocks: Iterable[Block]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for kind, block, place in blocks:
        if kind == "text":
            texts.append(string(block, "text", place))
        elif kind == "thinking":
            thoughts.append(string(block, "thinking", place))
        else:
            given = block.get("input", {})
            if not isinstance(given, dict):
                raise bad_request(f"{place}.input must be an object.", f"{place}.input", "invalid_value")
            arguments = json.dumps(given, ensure_ascii=False)
            calls.append(function_call(string(block, "id", place), string(block, "name", place), arguments))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise wrong_kind(place, tool["type"], ("custom",))
    return function_tool(tool, place, "input_schema", _TOOL_FIELDS)


def _tool_choice(choice: ToolChoice) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    if choice.type == "tool":
        if not choice.name:
            raise bad_request("tool_choice.name is missing.", "tool_choice.name", "missing_parameter")
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        chat["tool_choice"] = _TOOL_CHOICES[choice.type]
    if choice.disable_parallel_tool_use:
        chat["parallel_tool_calls"] = False
    return chat
