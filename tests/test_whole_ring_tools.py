"""Tool calls through a real ring of three stages, with the openai client and Open WebUI's requests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import open_webui
from tests.ring_processes import RingProcesses
from tests.talking_model import write_talking_model
from tests.tiny_models import CHAT_TEMPLATE
from tests.tool_models import QWEN3

pytestmark = [pytest.mark.long]

CALLS = (
    *("<think>", "\nIt asks", " for rain.\n", "</think>", "\n\nI look.\n"),
    *('<tool_call>\n{"name": "get_weather"', ', "arguments": {"city":', ' "Köln",', ' "days"', ": 2}}"),
    *("\n</tool_call>", "\n<tool_call>", '{"name":', '"now", ', '"arguments": {}}', "</tool_call>"),
)
# After a result the template ends with another token, and the answer is another.
TEMPLATE = QWEN3.replace(
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}",
    "{%- if add_generation_prompt %}{{- '<|pad|>' if messages[-1].role == 'tool' else '<|assistant|>' }}",
)
ANSWERS = {"<|assistant|>": CALLS, "<|pad|>": ("Rain", " in Köln", " for two days.")}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ASKED: Any = {"role": "user", "content": "Will it rain in Köln?"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("ring")
    model = write_talking_model(directory / "tiny", ANSWERS, TEMPLATE, num_layers=5)
    layers = [(0, 2), (2, 3), (3, 5)]
    with RingProcesses(directory, model, layers, context=1200, with_api=True) as ring:
        yield ring.wait_api()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_agents_turn(client: openai.OpenAI) -> None:
    """Question, two calls, their results, the answer: as agents do it."""
    fields: Any = {"model": "tiny", "tools": TOOLS, "temperature": 0}
    choice = client.chat.completions.create(messages=[ASKED], **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"] == "It asks for rain."
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Köln", "days": 2}),
        ("now", {}),
    ]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in calls]
    answer = client.chat.completions.create(messages=[ASKED, choice.message, *results], **fields).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Rain in Köln for two days.", "stop")


def test_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=[ASKED], tools=TOOLS, temperature=0, n=2
    ) as stream:
        events = list(stream)
        choices = stream.get_final_completion().choices
    assert {event.type for event in events} >= {
        "content.delta",
        "tool_calls.function.arguments.delta",
        "chunk",
    }
    for choice in choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        calls: Any = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["get_weather", "now"]
        assert json.loads(calls[0].function.arguments) == {"city": "Köln", "days": 2}


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="tiny", messages=[ASKED], tools=TOOLS, temperature=0, parallel_tool_calls=False
    ).choices[0]
    assert [call.function.name for call in choice.message.tool_calls or () if call.type == "function"] == [
        "get_weather"
    ]


@pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="not installed (extra long)")
def test_langchain_binds_tools(url: str) -> None:
    from langchain_openai import ChatOpenAI

    with httpx.Client() as http:
        chat = ChatOpenAI(
            model="tiny", base_url=f"{url}/v1", api_key="none", max_retries=0, temperature=0, http_client=http
        ).bind_tools(TOOLS)
        said = chat.invoke("Will it rain in Köln?")
        assert [(call["name"], call["args"]) for call in said.tool_calls] == [
            ("get_weather", {"city": "Köln", "days": 2}),
            ("now", {}),
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in said.tool_calls]
        assert chat.invoke([ASKED, said, *results]).content == "Rain in Köln for two days."
        gathered = None
        for chunk in chat.stream("Will it rain in Köln?"):
            gathered = chunk if gathered is None else gathered + chunk
        assert gathered is not None
        assert [call["name"] for call in gathered.tool_calls] == ["get_weather", "now"]


def test_open_webui_with_its_builtin_tools(url: str) -> None:
    with httpx.Client(base_url=f"{url}/v1", headers=open_webui.HEADERS, timeout=60.0) as webui:
        reply = webui.post("/chat/completions", json=open_webui.WITH_TOOLS | {"temperature": 0})
        assert reply.status_code == 200, reply.text
        events = [line.removeprefix("data: ") for line in reply.text.split("\n") if line]
        assert events[-1] == "[DONE]"
        # As its middleware gathers them: by index, the first with id and name, the others with arguments
        calls: dict[int, dict[str, Any]] = {}
        for event in events[:-1]:
            for piece in json.loads(event)["choices"][0]["delta"].get("tool_calls", ()):
                if piece["index"] not in calls:
                    calls[piece["index"]] = piece
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        assert [call["function"]["name"] for call in calls.values()] == ["get_weather", "now"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in calls.values()]
        said = {"role": "assistant", "content": "I look.", "tool_calls": list(calls.values())}
        turn = [*open_webui.WITH_TOOLS["messages"], said, *results]
        reply = webui.post(
            "/chat/completions", json=open_webui.WITH_TOOLS | {"messages": turn, "temperature": 0}
        )
        assert reply.status_code == 200, reply.text
        assert "two days" in reply.text


def test_open_webui_and_a_model_that_knows_no_tools(tmp_path: Path) -> None:
    call = ("<tool_call>", '{"name": "get_current_timestamp", ', '"arguments": {}}', "</tool_call>")
    model = write_talking_model(tmp_path / "tiny", {"<|assistant|>": call}, CHAT_TEMPLATE, num_layers=3)
    with RingProcesses(tmp_path, model, [(0, 1), (1, 3)], context=1200, with_api=True) as ring:
        reply = httpx.post(
            f"{ring.wait_api()}/v1/chat/completions",
            json=open_webui.WITH_TOOLS | {"temperature": 0, "stream": False},
            timeout=60.0,
        )
    assert reply.status_code == 200, reply.text
    (said,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert said["function"] == {"name": "get_current_timestamp", "arguments": "{}"}
