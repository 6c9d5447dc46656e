"""What clients of the Responses API are sent: reasoning, text and function calls, whole and in events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.api.choice import Delta
from cluster.api.errors import unavailable
from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part, Reasoning
from cluster.api.prompt import Prompt
from cluster.api.responses import ResponsesShape
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
]
TOLD = {"id": "resp_1", "object": "response", "model": "tiny", "store": False, "incomplete_details": None}


def shape() -> ResponsesShape:
    return ResponsesShape(TOLD)


def whole(parts: list[Part], finish_reason: str) -> dict[str, Any]:
    return shape().whole([Prompt([1] * 7)], [(Delta(parts=parts), finish_reason)], Usage(7, 20, 0, 11))


def streamed(parts: list[Part], finish_reason: str) -> list[dict[str, Any]]:
    """With each part in a delta of its own."""
    writer = shape()
    text = writer.opening(0, Prompt([1] * 7))
    text += "".join(writer.delta(0, Delta(parts=[part])) for part in parts)
    text += writer.closing(0, finish_reason, "") + writer.end(Usage(7, 20, 0, 11)).decode()
    return events(text)


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for number, event in enumerate(text.split("\n\n")[:-1]):
        name, data = event.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert content["type"] == name.removeprefix("event: ")
        assert content["sequence_number"] == number
        found.append(content)
    return found


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_whole_response() -> None:
    response = whole(PARTS, "tool_calls")
    assert {name: response[name] for name in TOLD} == TOLD
    assert response["status"] == "completed"
    assert [item["id"].partition("_")[0] for item in response["output"]] == ["rs", "msg", "fc"]
    text = {"type": "output_text", "text": "I look it up.", "annotations": [], "logprobs": []}
    call = {"call_id": "call_1", "name": "weather", "arguments": '{"city": "Köln"}'}
    assert without_ids(response["output"]) == [
        {
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Let me see."}],
        },
        {"type": "message", "status": "completed", "role": "assistant", "content": [text]},
        {"type": "function_call", "status": "completed", **call},
    ]
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 11},
        "total_tokens": 27,
    }


def test_events_make_the_same_response() -> None:
    created, in_progress, *told, completed = streamed(PARTS, "tool_calls")
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert completed["type"] == "response.completed"
    assert without_ids(completed["response"]["output"]) == without_ids(whole(PARTS, "tool_calls")["output"])
    items = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert items == completed["response"]["output"]
    texts: dict[str, str] = {}
    for event in told:
        kind = event["type"].rpartition(".")
        if kind[2] == "delta":
            assert event["item_id"] == items[event["output_index"]]["id"]
            texts[kind[0]] = texts.get(kind[0], "") + event["delta"]
        elif kind[2] == "done" and kind[0] in texts:
            assert texts[kind[0]] == event.get("text", event.get("arguments"))
    assert texts == {
        "response.reasoning_text": "Let me see.",
        "response.output_text": "I look it up.",
        "response.function_call_arguments": '{"city": "Köln"}',
    }


def test_the_order_of_events_of_a_text() -> None:
    kinds = [event["type"].removeprefix("response.") for event in streamed([Content("x")], "stop")]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


@pytest.mark.parametrize("parts", [[Content("x")], [CallStart(0, "call_1", "f"), CallEnd(0, False)]])
def test_an_answer_that_is_cut_is_incomplete(parts: list[Part]) -> None:
    response = whole(parts, "length")
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert streamed(parts, "length")[-1]["type"] == "response.incomplete"


def test_a_stream_that_breaks_ends_with_an_error() -> None:
    writer = shape()
    writer.opening(0, Prompt([1]))
    text = writer.error(unavailable("A node is gone.")).decode()
    content = json.loads(text.partition("data: ")[2])
    assert (content["type"], content["sequence_number"]) == ("error", 2)
    assert content["message"] == content["error"]["message"] == "A node is gone."
