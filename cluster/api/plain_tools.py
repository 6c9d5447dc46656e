"""Tools for a model whose chat template knows none: they become text, in the form of Hermes 2 Pro. Pure.

The words are those of Qwen2.5's template, which many models have seen; the answer is read as `json_tools`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def with_plain_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, has_system: bool = True
) -> list[dict[str, Any]]:
    """The chat with its tools, calls and results written out, in the roles that every template has.

    The tools stand in the system message, or before the user's first words if the template has no such role.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        _append(plain, message)
    if not tools:
        return plain
    told = "".join([_BEFORE, *(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools), _AFTER])
    role = "system" if has_system else "user"
    if plain and plain[0]["role"] == role:
        parts = (plain[0]["content"], told) if has_system else (told, plain[0]["content"])
        return [plain[0] | {"content": "\n\n".join(parts)}, *plain[1:]]
    return [{"role": role, "content": told}, *plain]


def _append(plain: list[dict[str, Any]], message: Mapping[str, Any]) -> None:
    if message["role"] == "tool":
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        if plain and plain[-1]["role"] == "user" and plain[-1]["content"].endswith("</tool_response>"):
            plain[-1]["content"] += f"\n{result}"  # results of several calls are one message
        else:
            plain.append({"role": "user", "content": result})
        return
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    if calls:
        kept["content"] = "\n".join([kept["content"], *calls] if kept["content"] else calls)
    plain.append(kept)
