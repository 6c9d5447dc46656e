"""Tools and thinking through the other dialects, with their own packages and answers as models write them.

Each conversation must make the prompt that the same chat makes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api_server import Served, serving
from tests.test_api_tools import ids, prompt_of
from tests.test_message_reader import ANSWERS, NOW, TOOLS, WEATHER
from tests.tool_models import QWEN3, QWEN3_TOKENS, write_tokens

HI: Any = [{"role": "user", "content": "hi"}]
ANSWER = "<think>\nhm\n</think>\n\nLet me see.\n" + ANSWERS["json_tools"][0]
RESULTS = ("Rain", "8 o'clock")
MESSAGES_TOOLS: Any = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]
RESPONSES_TOOLS: Any = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("anthropic") is None, reason="anthropic is not installed (extra long)"
    ),
]


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("tools")
    with serving(directory, change=lambda model: write_tokens(model, QWEN3_TOKENS, QWEN3)) as served:
        yield served


@pytest.fixture
def qwen(of_module: Served) -> Served:
    of_module.ring.reset()
    of_module.ring.text = ids(ANSWER)
    return of_module


@pytest.fixture
def anthropic(qwen: Served) -> Iterator[Any]:
    from anthropic import Anthropic

    with Anthropic(base_url=qwen.api.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def chat_prompts(qwen: Served) -> list[str]:
    """The prompts of a question, and of the turn after it, as a chat makes them."""
    said = qwen.openai.chat.completions.create(model="tiny", messages=HI, tools=TOOLS).choices[0].message
    prompts = [prompt_of(qwen)]
    told: Any = [
        {"role": "tool", "tool_call_id": call.id, "content": result}
        for call, result in zip(said.tool_calls or [], RESULTS, strict=True)
    ]
    turn: Any = [*HI, said, *told]
    qwen.openai.chat.completions.create(model="tiny", messages=turn, tools=TOOLS)
    return [*prompts, prompt_of(qwen)]


def test_messages(qwen: Served, anthropic: Any, chat_prompts: list[str]) -> None:
    fields: Any = {"model": "tiny", "max_tokens": 400, "tools": MESSAGES_TOOLS}
    whole = anthropic.messages.create(messages=HI, **fields)
    assert prompt_of(qwen) == chat_prompts[0]
    thinking, text, *uses = whole.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "hm", "Let me see.")
    assert [(use.name, use.input) for use in uses] == [WEATHER, NOW]
    assert whole.stop_reason == "tool_use"

    with anthropic.messages.stream(messages=HI, **fields) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert kinds.count("input_json") > 10  # the arguments come as the model writes them
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in streamed.content[2:]] == [WEATHER[1], NOW[1]]
    assert (streamed.content[0].thinking, streamed.content[1].text) == ("hm", "Let me see.")
    assert (streamed.stop_reason, streamed.usage) == ("tool_use", whole.usage)

    results = [
        {"type": "tool_result", "tool_use_id": use.id, "content": result}
        for use, result in zip(uses, RESULTS, strict=True)
    ]
    turn = [*HI, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    qwen.ring.text = b"Rain."
    last = anthropic.messages.create(messages=turn, **fields)
    assert prompt_of(qwen) == chat_prompts[1]
    assert ([block.text for block in last.content], last.stop_reason) == (["Rain."], "end_turn")


def test_responses(qwen: Served, chat_prompts: list[str]) -> None:
    fields: Any = {"model": "tiny", "tools": RESPONSES_TOOLS}
    whole = qwen.openai.responses.create(input=HI, **fields)
    assert prompt_of(qwen).replace(', "strict": false', "") == chat_prompts[0]
    reasoning, said, *calls = whole.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "hm"
    assert said.type == "message"
    assert whole.output_text == "Let me see."
    assert [call.name for call in calls if call.type == "function_call"] == [WEATHER[0], NOW[0]]
    assert whole.status == "completed"
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == len("hm")

    with qwen.openai.responses.stream(input=HI, **fields) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.delta") > 10
    assert [item.type for item in streamed.output] == [item.type for item in whole.output]
    assert [getattr(item, "arguments", "") for item in streamed.output] == [
        getattr(item, "arguments", "") for item in whole.output
    ]
    assert streamed.usage == whole.usage

    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": result}
        for call, result in zip(calls, RESULTS, strict=True)
        if call.type == "function_call"
    ]
    qwen.ring.text = b"Rain."
    turn: Any = [*HI, *whole.output, *results]
    last = qwen.openai.responses.create(input=turn, **fields)
    assert prompt_of(qwen) == chat_prompts[1]
    assert last.output_text == "Rain."


def test_logprobs_are_those_of_the_text(qwen: Served) -> None:
    fields: Any = {"model": "tiny", "input": HI, "tools": RESPONSES_TOOLS}
    fields["include"] = ["message.output_text.logprobs"]
    whole = qwen.openai.responses.create(**fields)
    reasoning, said, *calls = whole.output
    assert (reasoning.type, len(calls)) == ("reasoning", 2)
    assert said.type == "message"
    assert said.content[0].type == "output_text"
    assert "".join(entry.token for entry in said.content[0].logprobs or ()) == "Let me see."
    with qwen.openai.responses.stream(**fields) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        streamed: Any = stream.get_final_response().output[1]
    assert "".join(entry.token for event in deltas for entry in event.logprobs) == "Let me see."
    assert streamed.content[0].logprobs == said.content[0].logprobs


def test_thinking_can_be_switched(qwen: Served, anthropic: Any) -> None:
    qwen.ring.text = b"Hello."
    fields: Any = {"model": "tiny", "max_tokens": 400, "messages": HI}
    off, on = "<assistant><think>\n\n</think>\n\n", "<assistant>"
    anthropic.messages.create(**fields, thinking={"type": "disabled"})
    assert prompt_of(qwen).endswith(off)
    for thinking in ({"type": "enabled", "budget_tokens": 2000}, {"type": "adaptive"}):
        anthropic.messages.create(**fields, thinking=thinking)
        assert prompt_of(qwen).endswith(on)
    qwen.openai.responses.create(model="tiny", input="hi", reasoning={"effort": "none"})
    assert prompt_of(qwen).endswith(off)
    qwen.openai.responses.create(model="tiny", input="hi", reasoning={"effort": "high", "summary": "auto"})
    assert prompt_of(qwen).endswith(on)


def test_thinking_that_is_not_to_be_shown(qwen: Served, anthropic: Any) -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    told = anthropic.messages.create(
        model="tiny", max_tokens=400, messages=HI, tools=MESSAGES_TOOLS, thinking=thinking
    )
    assert told.content[0].thinking == ""
    assert told.content[1].text == "Let me see."


def test_one_call_at_a_time(qwen: Served, anthropic: Any) -> None:
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    told = anthropic.messages.create(
        model="tiny", max_tokens=400, messages=HI, tools=MESSAGES_TOOLS, tool_choice=choice
    )
    assert [block.name for block in told.content if block.type == "tool_use"] == ["get_weather"]
    fields: Any = {"model": "tiny", "tools": RESPONSES_TOOLS, "parallel_tool_calls": False}
    output = qwen.openai.responses.create(input=HI, **fields).output
    assert [item.name for item in output if item.type == "function_call"] == ["get_weather"]
