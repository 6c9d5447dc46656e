"""The messages of a chat as a template reads them, checked. Pure."""

from __future__ import annotations

import json
from typing import Any

from cluster.api.dialect import CACHE_MARKS, UNREAD, refuse_others, string
from cluster.api.errors import bad_request
from cluster.api.schema import ROLES
from cluster.tokenizer import Tokenizer

# Of a message an assistant once sent, these come back empty from OpenAI's client.
_EMPTY_FIELDS = ("refusal", "audio", "function_call", "tool_calls")
_TEMPLATE_FIELDS = ("name", "reasoning", "reasoning_content")
_CALL_FIELDS = ("id", "type", "function", "index", *CACHE_MARKS)


def read_messages(given: Any, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """With text parts joined, `developer` as the model knows it, calls as objects; raises ApiError."""
    if given is None:
        raise bad_request("messages is missing.", "messages", "missing_parameter")
    if not isinstance(given, list):
        raise bad_request("messages must be a list.", "messages", "invalid_value")
    if not given:
        raise bad_request("messages is empty.", "messages", "empty_prompt")
    return [_read_message(message, f"messages[{i}]", tokenizer) for i, message in enumerate(given)]


def _read_message(message: Any, place: str, tokenizer: Tokenizer) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_request(f"{place} must be an object with role and content.", place, "invalid_value")
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(
            f"{place}.role must be one of {', '.join(ROLES)}.", f"{place}.role", "invalid_value"
        )
    read: dict[str, Any] = {"role": role}
    if role == "developer" and not tokenizer.template_mentions("developer"):
        read["role"] = "system"
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    is_call = calls or (role == "assistant" and message.get("function_call"))  # the latter is refused below
    read["content"] = "" if is_call and content is None else _read_content(content, f"{place}.content", role)
    if calls:
        read["tool_calls"] = _read_calls(calls, f"{place}.tool_calls")
    for name, value in message.items():
        if name in ("role", "content", *UNREAD) or value is None or (name == "tool_calls" and calls):
            continue
        is_call_id = name == "tool_call_id" and role == "tool"
        if (name in _TEMPLATE_FIELDS or is_call_id) and isinstance(value, str):
            read[name] = value
        elif name not in _EMPTY_FIELDS or value != []:
            raise bad_request(f"{place}.{name} is not supported.", f"{place}.{name}", "unsupported_parameter")
    return _with_reasoning(read, tokenizer)


def _with_reasoning(message: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The reasoning under the name that the template reads."""
    text = message.get("reasoning_content") or message.get("reasoning")
    if text and tokenizer.template_mentions("reasoning_content"):
        message["reasoning_content"] = text
    # gpt-oss takes it with calls, and then only in the place of content
    if text and "tool_calls" in message and not message["content"]:
        message |= {"thinking": text} if tokenizer.template_mentions("message.thinking") else {}
    return message


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the arguments of calls as JSON text."""
    return [
        message | {"tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}


def _read_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad_request(f"{place} must be a list.", place, "invalid_value")
    return [_read_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def _read_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise bad_request(
            f"{place} must be a call of a function: {{id, type, function: {{name, arguments}}}}.",
            place,
            "invalid_value",
        )
    for name in call.keys() - _CALL_FIELDS:
        raise bad_request(f"{place}.{name} is not supported.", f"{place}.{name}", "unsupported_parameter")
    if not isinstance(function.get("name"), str):
        raise bad_request(f"{place}.function.name must be a text.", f"{place}.function.name", "invalid_value")
    read: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": _arguments(function, place)},
    }
    if isinstance(call.get("id"), str):
        read["id"] = call["id"]
    return read


def _arguments(function: dict[str, Any], place: str) -> dict[str, Any]:
    """An object, as mlx-lm gives it to templates."""
    given = function.get("arguments")
    where = f"{place}.function.arguments"
    try:
        arguments = json.loads(given or "{}") if given is None or isinstance(given, str) else given
    except ValueError as error:
        raise bad_request(f"{where} is not valid JSON: {error}", where, "invalid_value") from None
    if not isinstance(arguments, dict):
        raise bad_request(f"{where} must be a JSON object.", where, "invalid_value")
    return arguments


def _read_content(content: Any, place: str, role: str) -> str:
    if isinstance(content, list):
        content = "".join([_read_part(part, f"{place}[{i}]", role) for i, part in enumerate(content)])
    if not isinstance(content, str):
        raise bad_request(f"{place} must be a text or a list of text parts.", place, "invalid_value")
    return content


def _read_part(part: Any, place: str, role: str) -> str:
    """A text; of an assistant a refusal too, which it said as a text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or (kind != "text" and (kind, role) != ("refusal", "assistant")):
        shown = f" of type {kind[:60]!r}" if isinstance(kind, str) else ""
        raise bad_request(f"{place}: a part{shown} is not supported; only text parts are.", place)
    refuse_others(part, ("type", kind, *UNREAD), place)
    return string(part, kind, place)
