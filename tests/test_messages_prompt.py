"""Anthropic's requests as chats: what becomes of each block, tool and switch, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.api.errors import ApiError
from cluster.api.messages_body import MessagesBody, MessagesChat
from cluster.api.messages_prompt import to_chat
from cluster.api.schema import parse_body, read_body

USER = {"role": "user", "content": "hi"}
WEATHER = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}}


def chat(*variables: str, **fields: Any) -> dict[str, Any]:
    """The chat of a body, for a template that reads these variables; a chat body must hold it."""
    body = parse_body(json.dumps({"messages": [USER], **fields}).encode(), MessagesBody)
    body.check()
    return to_chat(body, lambda name: name in variables)


def messages(*given: Any, **fields: Any) -> list[dict[str, Any]]:
    return chat(messages=list(given), **fields)["messages"]  # type: ignore[no-any-return]


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def test_texts() -> None:
    blocks = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b", "citations": None},
    ]
    assert messages({"role": "user", "content": blocks}, system=blocks) == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "ab"},
    ]
    assert messages(USER, system="") == [USER]
    assert messages({"role": "user", "content": []}) == [{"role": "user", "content": ""}]


def test_calls_and_their_results() -> None:
    said = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "I look."},
        CALL,
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "Rain"}]},
        {"type": "tool_result", "tool_use_id": "call_2", "content": "No such city", "is_error": True},
        {"type": "tool_result", "tool_use_id": "call_3"},
        {"type": "text", "text": "And "},
        {"type": "text", "text": "now?"},
    ]
    function = {"name": "weather", "arguments": '{"city": "Köln"}'}
    assert messages(USER, {"role": "assistant", "content": said}, {"role": "user", "content": results}) == [
        USER,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Error: No such city"},
        {"role": "tool", "tool_call_id": "call_3", "content": ""},
        {"role": "user", "content": "And now?"},
    ]


def test_an_answer_goes_on_from_the_assistants_last_words() -> None:
    given = chat(messages=[USER, {"role": "assistant", "content": "The answer is"}])
    assert given["continue_final_message"] is True
    assert given["add_generation_prompt"] is False
    assert "continue_final_message" not in chat()
    error = refusal(messages=[USER, {"role": "assistant", "content": [CALL]}])
    assert error.message == "messages[1]: tool_use needs a tool_result in the next message."


def test_tools() -> None:
    given = [
        {**WEATHER, "type": "custom", "cache_control": {}, "strict": True, "allowed_callers": ["direct"]}
    ]
    function = {"name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert chat(tools=given)["tools"] == [{"type": "function", "function": function}]
    assert "tools" not in chat(tools=[])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather"},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
    ],
)
def test_tool_choice(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    given = chat(tool_choice=choice)
    assert {name: given[name] for name in expected} == expected


def test_what_keeps_its_meaning_under_another_name() -> None:
    given = chat(
        model="tiny", stop_sequences=["a"] * 10, temperature=0.5, top_p=0.9, top_k=3, stream=True, seed=1
    )
    assert given["stop"] == ["a"] * 10
    body = read_body(given, MessagesChat)
    assert body.stops == ("a",) * 10
    assert (body.temperature, body.top_p, body.top_k, body.stream, body.seed) == (0.5, 0.9, 3, True, 1)


def test_thinking_is_a_switch_of_the_template() -> None:
    enabled = {"type": "enabled", "budget_tokens": 2048}
    assert chat("enable_thinking", thinking=enabled)["chat_template_kwargs"] == {"enable_thinking": True}
    assert chat("thinking", thinking={"type": "disabled"})["chat_template_kwargs"] == {"thinking": False}
    assert "chat_template_kwargs" not in chat(thinking={"type": "adaptive", "display": "omitted"})
    own = chat("enable_thinking", thinking=enabled, chat_template_kwargs={"enable_thinking": False})
    assert own["chat_template_kwargs"] == {"enable_thinking": False}


def test_effort_goes_to_a_template_that_knows_it() -> None:
    low, high = {"effort": "low"}, {"effort": "high"}
    for variable in ("reasoning_effort", "enable_thinking"):
        assert chat(variable, output_config=low)["reasoning_effort"] == "low"
    assert "reasoning_effort" not in chat(output_config=high)
    error = refusal(output_config=low)
    assert error.param == "output_config.effort"
    assert error.message.endswith(
        "'low' is not supported, for this model's chat template takes none; leave it out."
    )


def test_an_output_format_is_a_response_format() -> None:
    schema = {"type": "object"}
    given = chat(output_config={"format": {"type": "json_schema", "schema": schema}})
    expected = {"name": "output", "schema": schema, "strict": True}
    assert given["response_format"] == {"type": "json_schema", "json_schema": expected}


def test_what_changes_no_token_is_accepted() -> None:
    fields = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": []},
        "mcp_servers": [],
        "container": None,
    }
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "place", "words"),
    [
        ({"messages": None}, "messages", "messages is missing."),
        ({"messages": "hi"}, "messages", "messages must be a list."),
        ({"messages": []}, "messages", "messages is empty."),
        ({"messages": ["hi"]}, "messages[0]", "messages[0] must be an object."),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "messages[0].role must be one of user, assistant, system.",
        ),
        (
            {"messages": [{**USER, "name": "me"}]},
            "messages[0].name",
            "messages[0].name is not supported.",
        ),
        (
            {"messages": [{"role": "user", "content": 1}]},
            "messages[0].content",
            "messages[0].content must be a text or a list of blocks.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]",
            "messages[0].content[0]: the type 'image' is not supported here; "
            "what may stand here is text, tool_result.",
        ),
        (
            {"messages": [{"role": "user", "content": [CALL]}]},
            "messages[0].content[0]",
            "messages[0].content[0]: the type 'tool_use' is not supported here; "
            "what may stand here is text, tool_result.",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
            "messages[0].content[0]",
            "messages[0].content[0]: the type 'redacted_thinking' is not supported here; "
            "what may stand here is text, thinking, tool_use.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": [1]}]}]},
            "messages[0].content[0].mood",
            "messages[0].content[0].mood is not supported.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "messages[0].content[0].text must be a text.",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{**CALL, "input": "x"}]}]},
            "messages[0].content[0].input",
            "messages[0].content[0].input must be an object.",
        ),
        (
            {"system": [{"type": "image"}]},
            "system[0]",
            "system[0]: the type 'image' is not supported here; what may stand here is text.",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0]",
            "tools[0]: the type 'web_search_20250305' is not supported here; what may stand here is custom.",
        ),
        (
            {"tools": [{**WEATHER, "defer_loading": True}]},
            "tools[0].defer_loading",
            "tools[0].defer_loading is not supported.",
        ),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "tools[0].input_schema must be an object."),
        ({"tools": "f"}, "tools", "tools must be a list."),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "tool_choice.name is missing."),
        (
            {"thread": {"id": "t"}},
            "thread",
            "thread is not supported: nothing is stored here; send the whole conversation in messages "
            "(thread=False).",
        ),
        ({"stop": ["a"]}, "stop", "stop is not a field of this request."),
        (
            {"max_completion_tokens": 1},
            "max_completion_tokens",
            "max_completion_tokens is not a field of this request.",
        ),
        ({"mcp_servers": [{}]}, "mcp_servers", "mcp_servers is not supported with the value [{}]."),
    ],
)
def test_refusals(fields: dict[str, Any], place: str, words: str) -> None:
    error = refusal(**fields)
    assert (error.param, error.message) == (place, words)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
        ({"tool_choice": "auto"}, "tool_choice"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], place: str) -> None:
    assert refusal(**fields).param == place
