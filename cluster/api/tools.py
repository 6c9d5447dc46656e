"""The tools of a chat request, checked (platform.openai.com/docs/guides/function-calling). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.api.dialect import CACHE_MARKS
from cluster.api.errors import ApiError, bad_request

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that the model is told of, and what it may or must do with them."""

    tools: tuple[dict[str, Any], ...] = ()  # in OpenAI's form, each with parameters
    choice: str = "auto"  # or required
    named: str = ""  # the only function that may be called, which must be
    max_calls: int | None = None

    @property
    def must_call(self) -> bool:
        return bool(self.named) or self.choice == "required"


def read_tools(tools: Any, choice: Any, is_parallel: bool | None) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls`; raises ApiError. With "none" there are no tools."""
    if tools is not None and not isinstance(tools, list):
        raise _wrong("tools", "must be a list")
    read = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in read]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise _wrong(f"tools[{i}].function.name", f"{name!r} is there twice")
    max_calls = 1 if is_parallel is False else None
    if choice in (None, "auto"):
        return ToolUse(read, max_calls=max_calls)
    if choice == "none":
        return ToolUse()
    if not read:
        raise _wrong("tool_choice", "needs tools")
    if choice == "required":
        return ToolUse(read, "required", max_calls=max_calls)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return ToolUse(read, "required", _named(choice, "tool_choice", names), max_calls=1)
    if kind == "allowed_tools":
        return _allowed(choice, read, names, max_calls)
    raise _wrong(
        "tool_choice", 'must be "none", "auto", "required" or an object of the type function or allowed_tools'
    )


def _read_tool(tool: Any, place: str) -> dict[str, Any]:
    """With an empty object of parameters where there are none: many templates ask for it.

    Without the marks of a cache, which a template would tell the model of.
    """
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        shown = f" of the type {kind[:60]!r}" if isinstance(kind, str) else ""
        raise bad_request(
            f"{place}: a tool{shown} is not supported; only functions are.", place, "unsupported_parameter"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _wrong(f"{place}.function", "must be an object")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME_CHARS:
        raise _wrong(f"{place}.function.name", f"must be a text of 1 to {MAX_NAME_CHARS} characters")
    if not isinstance(function.get("description", ""), str | None):
        raise _wrong(f"{place}.function.description", "must be a text")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise _wrong(f"{place}.function.parameters", "must be an object, a JSON Schema")
    given = {key: value for key, value in function.items() if value is not None and key not in CACHE_MARKS}
    read = {key: value for key, value in tool.items() if key not in CACHE_MARKS}
    return read | {"function": given | {"parameters": parameters or NO_PARAMETERS}}


def _named(choice: dict[str, Any], place: str, names: list[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in names:
        raise _wrong(f"{place}.function.name", f"must be one of the tools: {', '.join(names)[:200]}")
    return name


def _allowed(
    choice: dict[str, Any], tools: tuple[dict[str, Any], ...], names: list[str], max_calls: int | None
) -> ToolUse:
    """A choice among some of the tools; the model is told of these alone."""
    allowed = choice.get("allowed_tools")
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list) or not allowed["tools"]:
        raise _wrong("tool_choice.allowed_tools", "must be an object with mode and tools")
    if allowed.get("mode") not in ("auto", "required"):
        raise _wrong("tool_choice.allowed_tools.mode", 'must be "auto" or "required"')
    wanted = {
        _named(tool if isinstance(tool, dict) else {}, f"tool_choice.allowed_tools.tools[{i}]", names)
        for i, tool in enumerate(allowed["tools"])
    }
    some = tuple(tool for tool in tools if tool["function"]["name"] in wanted)
    return ToolUse(some, allowed["mode"], max_calls=max_calls)


def _wrong(place: str, what: str) -> ApiError:
    return bad_request(f"{place} {what}.", place, "invalid_value")
