"""What Anthropic's clients are sent: blocks of text, thinking and tool use, whole and in events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.api.choice import Delta
from cluster.api.errors import ApiError, unavailable
from cluster.api.messages import MessagesShape, model_info
from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part, Reasoning
from cluster.api.prompt import Prompt
from cluster.api.shape import Usage

PARTS: list[Part] = [
    Reasoning("Let me "),
    Reasoning("see."),
    Content("I look "),
    Content("it up."),
    CallStart(0, "call_1", "weather"),
    CallArguments(0, '{"city": '),
    CallArguments(0, '"Köln"}'),
    CallEnd(0),
    CallStart(1, "call_2", "time"),
    CallEnd(1),
]
BLOCKS = [
    {"type": "thinking", "thinking": "Let me see.", "signature": ""},
    {"type": "text", "text": "I look it up."},
    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}},
    {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
]
USAGE = {
    "input_tokens": 7,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 20,
}


def shape(**options: Any) -> MessagesShape:
    return MessagesShape("msg_1", "tiny", 7, "req_1", **options)


def whole(parts: list[Part], finish_reason: str, stop_string: str = "", **options: Any) -> dict[str, Any]:
    answer = (Delta(parts=parts, stop_string=stop_string), finish_reason)
    return shape(**options).whole([Prompt([1] * 7)], [answer], Usage(7, 20))


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for event in text.split("\n\n")[:-1]:
        name, data = event.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert content["type"] == name.removeprefix("event: ")
        found.append(content)
    return found


def streamed(parts: list[Part], finish_reason: str, **options: Any) -> list[dict[str, Any]]:
    """With each part in a delta of its own."""
    writer = shape(**options)
    text = writer.opening(0, Prompt([1] * 7))
    text += "".join(writer.delta(0, Delta(parts=[part])) for part in parts)
    text += writer.closing(0, finish_reason, "") + writer.end(Usage(7, 20)).decode()
    return events(text)


def test_whole_message() -> None:
    assert whole(PARTS, "tool_calls") == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": BLOCKS,
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": USAGE,
    }


def test_events_make_the_same_message() -> None:
    start, *told, delta, stop = streamed(PARTS, "tool_calls")
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is None
    assert start["message"]["usage"] == {**USAGE, "output_tokens": 0}
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"] == USAGE
    assert stop == {"type": "message_stop"}
    blocks: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    is_open = False
    for event in told:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                is_open = True
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                kind, delta = event["delta"]["type"], event["delta"]
                if kind == "input_json_delta":
                    inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
                else:
                    field = kind.removesuffix("_delta")
                    blocks[-1][field] += delta[field]
            case "content_block_stop":
                is_open = False
    assert not is_open
    for index, text in inputs.items():
        blocks[index]["input"] = json.loads(text)
    assert blocks == BLOCKS


@pytest.mark.parametrize(
    ("finish_reason", "stop_string", "options", "reason"),
    [
        ("stop", "", {}, "end_turn"),
        ("stop", "\n\nHuman:", {}, "stop_sequence"),
        ("length", "", {}, "max_tokens"),
        ("length", "", {"is_context_limit": True}, "model_context_window_exceeded"),
        ("stop", "", {"is_context_limit": True}, "end_turn"),
        ("tool_calls", "", {}, "tool_use"),
    ],
)
def test_stop_reasons(finish_reason: str, stop_string: str, options: dict[str, Any], reason: str) -> None:
    message = whole([Content("x")], finish_reason, stop_string, **options)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop_string or None)


def test_an_answer_without_text_has_no_block() -> None:
    assert whole([], "stop")["content"] == []
    assert [event["type"] for event in streamed([], "stop")] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


def test_thinking_that_was_not_asked_for_is_an_empty_block() -> None:
    hidden = [{"type": "thinking", "thinking": "", "signature": ""}, *BLOCKS[1:]]
    assert whole(PARTS, "tool_calls", is_thinking_shown=False)["content"] == hidden
    assert "thinking_delta" not in json.dumps(streamed(PARTS, "tool_calls", is_thinking_shown=False))


@pytest.mark.parametrize("arguments", ['{"city": "Kö', "[1]", "nonsense"])
def test_a_call_that_is_cut_has_no_input(arguments: str) -> None:
    parts: list[Part] = [CallStart(0, "call_1", "weather"), CallArguments(0, arguments), CallEnd(0, False)]
    assert whole(parts, "length")["content"][0]["input"] == {}


def test_a_stream_that_breaks_ends_with_an_error_of_anthropics() -> None:
    for error, kind in (
        (unavailable("A node is gone."), "overloaded_error"),
        (ApiError(500, "A node is gone."), "api_error"),
        (ApiError(418, "A node is gone."), "api_error"),
    ):
        (event,) = events(shape().error(error).decode())
        assert event == {
            "type": "error",
            "error": {"type": kind, "message": "A node is gone."},
            "request_id": "req_1",
        }


def test_a_model_says_when_and_how_large() -> None:
    told = model_info("tiny", 0, 4096)
    assert (told["id"], told["type"], told["max_input_tokens"]) == ("tiny", "model", 4096)
    assert told["created_at"] == "1970-01-01T00:00:00Z"
