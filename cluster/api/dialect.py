"""What the translations of other dialects into chats have in common. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.api.errors import ApiError, bad_request

# What a template may call the switch of a model's thinking, and its strength.
THINKING_SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"

# Of a part, a message or a tool. They change no token: a cache is transparent, and no template reads them.
CACHE_MARKS = ("cache_control", "prompt_cache_breakpoint")
UNREAD = (*CACHE_MARKS, "annotations", "citations")

Mentions = Callable[[str], bool]  # whether the model's chat template names this variable


def switch_thinking(is_on: bool, mentions: Mentions) -> dict[str, Any]:
    """Arguments of the template; none where it has no switch: the model decides by itself."""
    return {name: is_on for name in THINKING_SWITCHES if mentions(name)}


def effort_fields(effort: str, place: str, default: str, mentions: Mentions) -> dict[str, Any]:
    """Fields of a chat; raises ApiError for another effort than the default where the model takes none."""
    if any(mentions(name) for name in (EFFORT, *THINKING_SWITCHES)):
        return {"reasoning_effort": effort}
    if effort == default:
        return {}
    raise bad_request(
        f"{place}: {effort!r} is not supported, for this model's chat template takes none; leave it out.",
        place,
        "unsupported_parameter",
    )


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """An ApiError from within names the dialect's fields: `names` has them by the chat's."""
    try:
        yield
    except ApiError as error:
        for old, new in names.items():
            if error.param is not None and error.param.partition(".")[0] == old:
                error.message = re.sub(rf"\b{old}(\.json_schema)?", new, error.message)
                error.param = new
        raise


def items(given: Any, place: str) -> list[dict[str, Any]]:
    """A list of objects that is not empty; raises ApiError."""
    if given is None:
        raise bad_request(f"{place} is missing.", place, "missing_parameter")
    if not isinstance(given, list):
        raise bad_request(f"{place} must be a list.", place, "invalid_value")
    if not given:
        raise bad_request(f"{place} is empty.", place, "empty_prompt")
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise bad_request(f"{place}[{i}] must be an object.", f"{place}[{i}]", "invalid_value")
    return given


def string(item: Mapping[str, Any], name: str, place: str) -> str:
    """A field that must be a text; raises ApiError."""
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{place}.{name} must be a text.", f"{place}.{name}", "invalid_value")
    return value


def refuse_others(item: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Raises ApiError for a field that says something and is not known."""
    for name, value in item.items():
        if value and name not in known:
            raise unsupported(f"{place}.{name}")


def unsupported(place: str, why: str = "") -> ApiError:
    return bad_request(f"{place} is not supported{why}.", place, "unsupported_parameter")


def wrong_kind(place: str, kind: Any, allowed: Collection[str]) -> ApiError:
    """An object of another type than those that may stand there."""
    shown = f"the type {kind[:60]!r}" if isinstance(kind, str) else "an object without a type"
    return bad_request(
        f"{place}: {shown} is not supported here; what may stand here is {', '.join(allowed)}.",
        place,
        "unsupported_parameter",
    )


def function_tool(
    tool: Mapping[str, Any], place: str, parameters: str, known: Collection[str]
) -> dict[str, Any]:
    """A tool as chats have it; `parameters` is what the dialect calls the schema of its arguments."""
    if tool.get("allowed_callers") == ["direct"]:  # what it is anyway
        tool = {name: value for name, value in tool.items() if name != "allowed_callers"}
    refuse_others(tool, known, place)
    function: dict[str, Any] = {"name": string(tool, "name", place)}
    if tool.get("description") is not None:
        function["description"] = string(tool, "description", place)
    if not isinstance(tool.get(parameters), dict):
        raise bad_request(
            f"{place}.{parameters} must be an object.", f"{place}.{parameters}", "invalid_value"
        )
    function["parameters"] = tool[parameters]
    if tool.get("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def function_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as chats have it; `arguments` is JSON."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
