"""Requests of the Responses API as chats: how items become turns, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.api.errors import ApiError
from cluster.api.responses_body import ResponsesBody
from cluster.api.responses_prompt import to_chat
from cluster.api.schema import ChatBody, parse_body, read_body

CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"}
CHAT_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(*variables: str, **fields: Any) -> dict[str, Any]:
    """The chat of a body, for a template that reads these variables."""
    body = parse_body(json.dumps({"input": "hi", **fields}).encode(), ResponsesBody)
    body.check()
    return to_chat(body, lambda name: name in variables)


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    return chat(input=list(items), **fields)["messages"]  # type: ignore[no-any-return]


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_text_and_instructions() -> None:
    assert chat(instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_what_stands_first_is_one_message() -> None:
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]}
    assert messages(developer, {"role": "user", "content": "hi"}, developer, instructions="a") == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": "b"},
    ]


def test_a_turn_is_one_message() -> None:
    text = {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    items = [
        {"role": "user", "content": "hi"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]},
        CALL,
        {**CALL, "call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "2"}],
        },
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "So."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "Yes."},
    ]
    assert messages(*items) == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "call_2"}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        {"role": "tool", "tool_call_id": "call_2", "content": "2"},
        {"role": "assistant", "content": "No.", "reasoning_content": "So."},
        {"role": "assistant", "content": "Yes."},
    ]


def test_reasoning_without_text_says_nothing() -> None:
    empty = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}
    assert messages({"role": "user", "content": "hi"}, empty) == [{"role": "user", "content": "hi"}]


def test_tools_and_their_choice() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    direct = {"allowed_callers": ["direct"], "defer_loading": False}
    given = chat(
        tools=[{**tool, **direct, "strict": True}, {"type": "function", "name": "g", "parameters": None}]
    )
    assert given["tools"] == [
        {"type": "function", "function": {**function, "strict": True}},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
    ]
    assert chat(tool_choice="required")["tool_choice"] == "required"
    named = chat(tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False)
    assert named["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert named["parallel_tool_calls"] is False
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    assert chat(tool_choice=some)["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
    }


def test_formats() -> None:
    assert chat(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    given = chat(text={"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}})
    schema = {"name": "n", "schema": {}, "strict": True}
    assert given["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert "response_format" not in chat(text={"verbosity": "medium"})


def test_effort() -> None:
    low = {"effort": "low"}
    for variable in ("reasoning_effort", "thinking"):
        assert chat(variable, reasoning=low)["reasoning_effort"] == "low"
    assert "reasoning_effort" not in chat(reasoning={"effort": "medium", "summary": "auto"})
    assert refusal(reasoning=low).param == "reasoning.effort"


def test_a_chat_body_holds_it() -> None:
    given = chat(
        model="tiny", max_output_tokens=5, temperature=0.5, top_p=0.9, top_k=2, seed=1, stream=True,
        chat_template_kwargs={"a": 1},
    )  # fmt: skip
    body = read_body(given, ChatBody)
    assert (body.max_completion_tokens, body.temperature, body.top_k, body.seed) == (5, 0.5, 2, 1)
    assert body.chat_template_kwargs == {"a": 1}


def test_what_changes_no_token_is_accepted() -> None:
    fields = {
        "store": True,
        "metadata": {"a": "b"},
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
        "max_tool_calls": 3,
        "prompt_cache_key": "x",
        "truncation": "disabled",
        "background": False,
        "previous_response_id": None,
    }
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "place", "words"),
    [
        (
            {"previous_response_id": "resp_1"},
            "previous_response_id",
            "previous_response_id is not supported: nothing is stored here; "
            "send the whole conversation in input.",
        ),
        ({"conversation": "conv_1"}, "conversation", "conversation is not supported: nothing is stored here"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt is not supported: nothing is stored here"),
        ({"background": True}, "background", "background is not supported with the value true."),
        ({"truncation": "auto"}, "truncation", 'truncation is not supported with the value "auto".'),
        (
            {"include": ["message.mood"]},
            "include[0]",
            "include[0]: 'message.mood' is not supported.",
        ),
        ({"input": None}, "input", "input is missing."),
        ({"input": []}, "input", "input is empty."),
        ({"input": ["hi"]}, "input[0]", "input[0] must be an object."),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input[0]",
            "input[0]: the type 'item_reference' is not supported here; what may stand here is message, "
            "reasoning, function_call, function_call_output.",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "input[0].content[0]: the type 'input_image' is not supported here; what may stand here is "
            "input_text, output_text, text, refusal.",
        ),
        (
            {"input": [{"role": "user", "content": 1}]},
            "input[0].content",
            "input[0].content must be a text or a list of parts.",
        ),
        (
            {"input": [{"role": "tool", "content": "x"}]},
            "input[0].role",
            "input[0].role must be one of user, assistant, system, developer.",
        ),
        (
            {"input": [{**CALL, "arguments": '{"a": '}]},
            "input[0].arguments",
            "input[0].arguments must be the text of a JSON object.",
        ),
        (
            {"input": [{**CALL, "namespace": "n"}]},
            "input[0].namespace",
            "input[0].namespace is not supported.",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input[0].encrypted_content",
            "input[0].encrypted_content is not supported: only who wrote it can read it.",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0]",
            "tools[0]: the type 'web_search' is not supported here; what may stand here is function.",
        ),
        (
            {"tool_choice": {"type": "mcp"}},
            "tool_choice",
            "tool_choice: the type 'mcp' is not supported here; "
            "what may stand here is function, allowed_tools.",
        ),
        ({"max_tokens": 1}, "max_tokens", "max_tokens is not a field of this request."),
    ],
)
def test_refusals(fields: dict[str, Any], place: str, words: str) -> None:
    error = refusal(**fields)
    assert error.param == place
    assert error.message.startswith(words)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], place: str) -> None:
    assert refusal(**fields).param == place
