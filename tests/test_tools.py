"""The tools of a request and the messages about them: what is read, and what is refused with which words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.api.chat_messages import read_messages, with_text_arguments
from cluster.api.errors import ApiError
from cluster.api.plain_tools import with_plain_tools
from cluster.api.tools import NO_PARAMETERS, ToolUse, read_tools
from cluster.tokenizer import Tokenizer

F: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
G: dict[str, Any] = {"type": "function", "function": {"name": "g", "strict": True, "description": None}}
USER = {"role": "user", "content": "hi"}


def names(use: ToolUse) -> list[str]:
    return [tool["function"]["name"] for tool in use.tools]


def test_tools_get_parameters() -> None:
    f, g = read_tools([F, G], None, None).tools
    assert f == {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": NO_PARAMETERS},
    }
    assert g == {"type": "function", "function": {"name": "g", "strict": True, "parameters": NO_PARAMETERS}}


def test_marks_of_a_cache_are_not_told() -> None:
    marks = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
    marked = F | marks | {"function": F["function"] | marks}
    assert read_tools([marked], None, None) == read_tools([F], None, None)


def test_choices() -> None:
    assert read_tools(None, None, None) == read_tools([], "auto", True) == read_tools([F], "none", None)
    assert not read_tools([F], "auto", None).must_call
    assert read_tools([F], "auto", False).max_calls == 1
    assert read_tools([F], "required", None).must_call
    named = read_tools([F, G], {"type": "function", "function": {"name": "g"}}, None)
    assert (names(named), named.named, named.must_call, named.max_calls) == (["f", "g"], "g", True, 1)
    one = {"type": "function", "function": {"name": "g"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [one]}}
    some = read_tools([F, G], allowed, None)
    assert (names(some), some.must_call) == (["g"], False)


def test_wrong_tools() -> None:
    choice = {"type": "function", "function": {"name": "h"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": [choice]}}
    for tools, tool_choice, message in (
        ("f", None, "tools must be a list."),
        (["f"], None, "tools[0]: a tool is not supported; only functions are."),
        ([{"type": "web_search"}], None, "tools[0]: a tool of the type 'web_search' is not supported; only"),
        ([{"type": "function"}], None, "tools[0].function must be an object."),
        (
            [{"type": "function", "function": {"name": ""}}],
            None,
            "tools[0].function.name must be",
        ),
        (
            [F, {"type": "function", "function": {"name": "f"}}],
            None,
            "tools[1].function.name 'f' is there twice.",
        ),
        (
            [{"type": "function", "function": {"name": "f", "description": 1}}],
            None,
            "tools[0].function.description must be a text.",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            None,
            "tools[0].function.parameters must be an object, a JSON Schema.",
        ),
        (None, "required", "tool_choice needs tools."),
        ([F], "any", 'tool_choice must be "none", "auto", "required" or an object of the type function'),
        ([F, G], choice, "tool_choice.function.name must be one of the tools: f, g."),
        ([F], {"type": "function"}, "tool_choice.function.name must be one of the tools: f."),
        ([F], {"type": "allowed_tools"}, "tool_choice.allowed_tools must be an object with mode and tools."),
        ([F], allowed, 'tool_choice.allowed_tools.mode must be "auto" or "required".'),
    ):
        with pytest.raises(ApiError) as caught:
            read_tools(tools, tool_choice, None)
        assert caught.value.message.startswith(message)
        assert caught.value.status == 400


# -- messages -----------------------------------------------------------------------------------------


def tokenizer(template: str = "") -> Tokenizer:
    """As much of one as reading messages needs."""
    known = SimpleNamespace(template_mentions=lambda word: word in template)
    return cast(Tokenizer, known)


def called(arguments: Any, *, reasoning: str | None = None, **fields: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}
    return {"role": "assistant", "content": None, "reasoning": reasoning, "tool_calls": [call]}


def test_calls_of_a_message() -> None:
    (message,) = read_messages([called('{"a": "é"}', index=0)], tokenizer())
    function = {"name": "f", "arguments": {"a": "é"}}
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function, "id": "1"}],
    }
    for empty in (None, ""):
        (message,) = read_messages([called(empty)], tokenizer())
        assert message["tool_calls"][0]["function"]["arguments"] == {}
    message, user = with_text_arguments(read_messages([called({"a": "é"}), USER], tokenizer()))
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "é"}'}
    assert user == USER


def test_a_result_and_reasoning() -> None:
    result = {"role": "tool", "content": [{"type": "text", "text": "8"}], "tool_call_id": "1", "name": "f"}
    assert read_messages([result], tokenizer())[0] == result | {"content": "8"}
    said = {"role": "assistant", "content": "x", "reasoning": "hm"}
    assert read_messages([said], tokenizer("reasoning_content"))[0]["reasoning_content"] == "hm"
    oss = tokenizer("message.thinking")
    assert read_messages([called("{}", reasoning="hm")], oss)[0]["thinking"] == "hm"
    assert "thinking" not in read_messages([called("{}", reasoning="hm") | {"content": "I look."}], oss)[0]


def test_wrong_calls() -> None:
    place = "messages[0].tool_calls"
    for message, wanted in (
        (called("{"), f"{place}[0].function.arguments is not valid JSON: "),
        (called("[1]"), f"{place}[0].function.arguments must be a JSON object."),
        (called("{}", type="custom"), f"{place}[0] must be a call of a function: "),
        (called("{}", mood="bad"), f"{place}[0].mood is not supported."),
        ({"role": "assistant", "content": "", "tool_calls": "f"}, f"{place} must be a list."),
        (
            {"role": "assistant", "tool_calls": [{"function": {}}]},
            f"{place}[0].function.name must be a text.",
        ),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, f"{place} is not supported."),
    ):
        with pytest.raises(ApiError) as caught:
            read_messages([message], tokenizer())
        assert caught.value.message.startswith(wanted)


# -- templates that know no tools ---------------------------------------------------------------------


def test_tools_are_told_in_the_system_message_or_the_users() -> None:
    told = with_plain_tools([USER], [F])
    assert [message["role"] for message in told] == ["system", "user"]
    assert '\n<tools>\n{"type": "function", "function": {"name": "f"' in told[0]["content"]
    system = {"role": "system", "content": "Be kind."}
    told = with_plain_tools([system, USER], [F])
    assert told[0]["content"].startswith("Be kind.\n\n# Tools\n")
    told = with_plain_tools([USER], [F], has_system=False)
    assert len(told) == 1
    assert told[0]["content"].endswith("</tool_call>\n\nhi")
    assert with_plain_tools([system, USER], []) == [system, USER]


def test_calls_and_results_are_written_out() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    chat = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "8", "tool_call_id": "1"},
        {"role": "tool", "content": "9", "tool_call_id": "1"},
    ]
    written = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    results = "<tool_response>\n8\n</tool_response>\n<tool_response>\n9\n</tool_response>"
    assert with_plain_tools(chat, []) == [
        USER,
        {"role": "assistant", "content": f"{written}\n{written}"},
        {"role": "user", "content": results},
    ]
    assert "tool_calls" in chat[1]  # the client's messages are left alone
