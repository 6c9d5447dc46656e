"""Tool calls and reasoning over real sockets, with the openai client and answers as models write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api_server import CHAT, Served, serving
from tests.test_message_reader import ANSWERS, NOW, TOOLS, WEATHER
from tests.tool_models import FIRST_ID, QWEN3, QWEN3_TOKENS, write_tokens

long = pytest.mark.long

ANSWER = "Let me see.\n" + ANSWERS["json_tools"][0]
HI: Any = [{"role": "user", "content": "hi"}]
FIELDS: Any = {"model": "tiny", "messages": HI, "tools": TOOLS}


def ids(text: str) -> list[int]:
    """The tokens of `text`: its markers are tokens of their own."""
    for i, marker in enumerate(QWEN3_TOKENS):
        text = text.replace(marker, chr(0xE000 + i))
    found: list[int] = []
    for char in text:
        found += [FIRST_ID + ord(char) - 0xE000] if 0xE000 <= ord(char) < 0xE010 else char.encode()
    return found


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("tools")
    with serving(directory, change=lambda model: write_tokens(model, QWEN3_TOKENS, QWEN3)) as served:
        yield served


@pytest.fixture
def qwen(of_module: Served) -> Served:
    of_module.ring.reset()
    of_module.ring.text = ids(f"<think>\nhm\n</think>\n\n{ANSWER}")
    return of_module


def prompt_of(served: Served) -> str:
    """The last prompt's text."""
    names = ("<bos>", "<eos>", "<pad>", "<user>", "<assistant>", "<system>", *QWEN3_TOKENS)
    prompt = served.ring.prompts[served.ring.last.session]
    return b"".join(bytes([t]) if t < 256 else names[t - 256].encode() for t in prompt).decode()


def test_a_template_that_knows_no_tools(served: Served) -> None:
    tools: Any = [{"type": "function", "function": {"name": "now"}}]
    served.ring.text = b'One moment.\n<tool_call>\n{"name": "now", "arguments": {"zone": 1}}\n</tool_call>'
    fields: Any = {"model": "tiny", "messages": HI, "tools": tools}
    choice = served.openai.chat.completions.create(**fields).choices[0]
    (call,) = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert call.type == "function"
    assert (choice.message.content, call.function.name) == ("One moment.", "now")
    assert call.function.arguments == '{"zone": 1}'
    prompt = bytes(t for t in served.ring.prompts[served.ring.last.session] if t < 256).decode()
    assert prompt.startswith("# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"type": "function", "function": {"name": "now", "parameters": {' in prompt
    with served.openai.chat.completions.stream(**fields) as stream:
        assert stream.get_final_completion().choices[0].message.tool_calls
    choice = served.openai.chat.completions.create(
        **fields
        | {"messages": [*HI, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "8"}]}
    ).choices[0]
    prompt = bytes(t for t in served.ring.prompts[served.ring.last.session] if t < 256).decode()
    assert prompt.endswith(
        'hiOne moment.\n<tool_call>\n{"name": "now", "arguments": {"zone": 1}}\n</tool_call>'
        "<tool_response>\n8\n</tool_response>"
    )


@long
def test_a_whole_answer(qwen: Served) -> None:
    choice = qwen.openai.chat.completions.create(**FIELDS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [WEATHER, NOW]
    assert {call.type for call in calls} == {"function"}
    assert choice.message.model_extra == {"reasoning_content": "hm", "reasoning": "hm"}


@long
@pytest.mark.parametrize("fields", [{}, {"include_reasoning": False}, {"n": 2}])
def test_tokens_of_reasoning_are_counted(qwen: Served, fields: dict[str, Any]) -> None:
    body = {"messages": HI, "tools": TOOLS, **fields}
    details = {"reasoning_tokens": len("hm") * fields.get("n", 1)}
    told = qwen.post(CHAT, body)
    assert told["usage"]["completion_tokens_details"] == details
    assert told["choices"][0]["message"].get("reasoning_content") == (
        None if "include_reasoning" in fields else "hm"
    )
    *_, last, done = qwen.events(CHAT, body | {"stream_options": {"include_usage": True}})
    assert (last["usage"]["completion_tokens_details"], done) == (details, "[DONE]")
    qwen.ring.text = b"Hello."
    assert qwen.post(CHAT, body)["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


@long
def test_a_streamed_answer(qwen: Served) -> None:
    stream = qwen.openai.chat.completions.create(
        **FIELDS, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "hm"
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    starts = [piece for piece in pieces if piece.id]
    assert [(piece.index, piece.function.name, piece.type) for piece in starts if piece.function] == [
        (0, "get_weather", "function"),
        (1, "now", "function"),
    ]
    weather = [piece.function.arguments or "" for piece in pieces if piece.index == 0 and piece.function]
    assert weather[0] == ""
    assert len(weather) > 10  # in pieces, as the model writes them
    assert json.loads("".join(weather)) == WEATHER[1]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "tool_calls"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(qwen.ring.text) + 1


@long
def test_the_openai_clients_own_helper_joins_the_stream(qwen: Served) -> None:
    with qwen.openai.chat.completions.stream(**FIELDS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in message.tool_calls or []] == ["get_weather", "now"]


@long
def test_a_conversation_with_results(qwen: Served) -> None:
    said = qwen.openai.chat.completions.create(**FIELDS).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": f"r{i}"}]}
        for i, call in enumerate(said.tool_calls or [])
    ]
    qwen.ring.text = b"Rain."
    turn: Any = [*HI, said, *results]
    choice = qwen.openai.chat.completions.create(**FIELDS | {"messages": turn}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Rain.", "stop")
    tools = "".join("\n" + json.dumps(tool) for tool in TOOLS)
    assert prompt_of(qwen) == (
        f"<system># Tools{tools}<user>hi<assistant><think>hm</think>Let me see."
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        "<user><tool_response>r0</tool_response><user><tool_response>r1</tool_response><assistant>"
    )


@long
def test_tools_that_may_not_be_called(qwen: Served) -> None:
    message = qwen.chat(tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    assert prompt_of(qwen) == "<user>hi<assistant>"
    assert "tool_calls" not in message
    assert message["content"] == ANSWER


@long
def test_one_call_at_a_time(qwen: Served) -> None:
    choice = qwen.chat(tools=TOOLS, parallel_tool_calls=False)["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    assert choice["finish_reason"] == "tool_calls"
    qwen.ring.wait_empty()  # the second call was not waited for


@long
def test_an_answer_of_nothing_but_a_call_has_no_content(qwen: Served) -> None:
    qwen.ring.text = ids('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    message = qwen.chat(tools=TOOLS)["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning" not in message


@long
def test_a_call_that_max_tokens_cuts(qwen: Served) -> None:
    choice = qwen.chat(tools=TOOLS, max_tokens=qwen.ring.text.index("ö".encode()[0]) + 2)["choices"][0]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("get_weather", '{"city": "Kö')


@long
def test_a_stop_string_within_an_answer_with_tools(qwen: Served) -> None:
    choice = qwen.chat(tools=TOOLS, stop="see")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me ", "stop")


@long
def test_reasoning_without_tools(qwen: Served) -> None:
    qwen.ring.text = ids("<think>\nhm\n</think>\n\nHello.")
    message = qwen.chat()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("Hello.", "hm", "hm")
    message = qwen.chat(include_reasoning=False)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello.", "refusal": None}
    events = qwen.events(CHAT, {"messages": HI, "include_reasoning": False})
    deltas = [event["choices"][0]["delta"] for event in events[1:-2]]
    assert "".join(delta["content"] for delta in deltas) == "Hello."


@long
def test_reasoning_effort_is_the_switch_of_a_template_without_efforts(qwen: Served) -> None:
    qwen.ring.text = b"Hello."
    qwen.chat(reasoning_effort="none")
    assert prompt_of(qwen).endswith("<assistant><think>\n\n</think>\n\n")
    qwen.chat(reasoning_effort="high")
    assert prompt_of(qwen).endswith("<assistant>")
    qwen.chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
    assert prompt_of(qwen).endswith("<assistant>")


@long
def test_token_ids_and_log_probabilities_of_a_call(qwen: Served) -> None:
    fields = {"messages": HI, "tools": TOOLS, "return_token_ids": True, "logprobs": True}
    tokens, logprobs = [], []
    for event in qwen.events(CHAT, fields)[1:-2]:
        choice = event["choices"][0]
        tokens += choice.get("token_ids", [])
        logprobs += (choice["logprobs"] or {"content": []})["content"]
    assert tokens[:-1] == qwen.ring.text
    assert len(logprobs) == len(tokens)
    whole = qwen.post(CHAT, fields)["choices"][0]
    assert whole["token_ids"] == tokens
    assert len(whole["logprobs"]["content"]) == len(tokens)


@long
def test_documents_need_a_template_that_takes_them(qwen: Served) -> None:
    error = qwen.error({"messages": HI, "documents": [{"title": "a", "text": "b"}]}, path=CHAT)
    assert error["message"] == "documents: this model's chat template takes none; put them into a message."
