"""Anthropic's Messages and OpenAI's Responses over HTTP, in front of a scripted ring."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from cluster.grammar import json_schema_grammar
from tests.api_server import Served
from tests.scripted_ring import CONTEXT

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "name": "x", "strict": True}
HI = [{"role": "user", "content": "hi"}]


def message(served: Served, **fields: Any) -> dict[str, Any]:
    return served.post(MESSAGES, {"max_tokens": 50, "messages": HI, **fields})


def refused(served: Served, path: str = MESSAGES, status: int = 400, **fields: Any) -> dict[str, Any]:
    """Anthropic's error object."""
    reply = served.http.post(path, json={"max_tokens": 5, "messages": HI, **fields})
    assert reply.status_code == status
    content = reply.json()
    assert content["type"] == "error"
    assert content["request_id"] == reply.headers["x-request-id"] == reply.headers["request-id"]
    return content["error"]  # type: ignore[no-any-return]


def events(served: Served, path: str, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    reply = served.http.post(path, json=body | {"stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    pairs = [event.split("\n") for event in reply.text.split("\n\n")[:-1]]
    return [(n.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for n, d in pairs]


# -- Messages -----------------------------------------------------------------------------------------


def test_a_message(served: Served) -> None:
    told = message(served, temperature=0.5, top_k=3, top_p=0.5, stop_sequences=["wor"])
    assert told["content"] == [{"type": "text", "text": "Hello, "}]
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", "wor")
    assert told["id"].startswith("msg_")
    sampling = served.ring.last.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.5, 3)
    assert served.ring.last.prompt_tokens == told["usage"]["input_tokens"]


def test_a_streamed_message_is_the_same(served: Served) -> None:
    body = {"max_tokens": 5, "messages": HI}
    told = events(served, MESSAGES, body)
    assert [name for name, _ in told[:2]] == ["message_start", "content_block_start"]
    texts = [data["delta"]["text"] for name, data in told if name == "content_block_delta"]
    assert "".join(texts) == message(served, **body)["content"][0]["text"] == "Hello"
    assert [name for name, _ in told[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert told[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert told[-2][1]["usage"]["output_tokens"] == 5


def test_counting_is_what_the_message_says(served: Served) -> None:
    body = {"messages": HI, "system": "be brief"}
    counted = served.post(f"{MESSAGES}/count_tokens", body)
    assert counted == {"input_tokens": message(served, **body)["usage"]["input_tokens"]}
    assert served.post(f"{MESSAGES}/count_tokens", {"messages": HI})["input_tokens"] < counted["input_tokens"]


def test_more_tokens_than_the_context_has_are_those_it_has(served: Served) -> None:
    told = message(served, max_tokens=32000)
    assert served.ring.last.max_tokens == CONTEXT - told["usage"]["input_tokens"]
    assert told["stop_reason"] == "end_turn"
    served.ring.text = b"x" * CONTEXT
    assert message(served, max_tokens=32000)["stop_reason"] == "model_context_window_exceeded"


def test_errors_have_anthropics_shape(served: Served) -> None:
    assert refused(served, max_tokens=None) == {
        "type": "invalid_request_error",
        "message": "max_tokens is missing.",
    }
    assert refused(served, model="claude", status=404)["type"] == "not_found_error"
    assert refused(served, path=f"{MESSAGES}/batches", status=404)["message"].startswith("There is no POST")
    too_long = refused(served, messages=[{"role": "user", "content": "x" * CONTEXT}])
    assert "maximum context length is 600 tokens" in too_long["message"]
    reply = served.http.get("/v1/models/claude", headers={"anthropic-version": "2023-06-01"})
    assert reply.json()["error"]["type"] == "not_found_error"


def test_a_failing_stream_ends_with_anthropics_error(served: Served) -> None:
    served.ring.error, served.ring.error_at = "stage 1 ran out of memory", 3
    name, data = events(served, MESSAGES, {"max_tokens": 9, "messages": HI})[-1]
    assert name == "error"
    assert data["error"] == {"type": "api_error", "message": "stage 1 ran out of memory"}
    served.ring.error_at = 0
    assert refused(served, stream=True, status=500)["type"] == "api_error"


def test_models_for_anthropics_clients(served: Served) -> None:
    listed = served.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    (model,) = listed["data"]
    assert (model["type"], model["id"], model["max_input_tokens"]) == ("model", "tiny", CONTEXT)
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "tiny", "tiny")


def test_tool_use(served: Served) -> None:
    served.ring.text = b'One moment.\n<tool_call>\n{"name": "now", "arguments": {"zone": 1}}\n</tool_call>'
    tools = [{"name": "now", "input_schema": {"type": "object", "properties": {}}}]
    told = message(served, tools=tools, max_tokens=200)
    text, use = told["content"]
    assert text == {"type": "text", "text": "One moment."}
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "now", {"zone": 1})
    assert told["stop_reason"] == "tool_use"
    assert message(served, tools=tools, tool_choice={"type": "none"})["content"][0]["type"] == "text"


def test_an_answer_of_a_fixed_form(served: Served) -> None:
    message(served, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert served.ring.last.sampling.grammar == json_schema_grammar(SCHEMA)
    served.post(RESPONSES, {"input": "hi", "text": {"format": {**FORMAT, "schema": SCHEMA}}})
    assert served.ring.last.sampling.grammar == json_schema_grammar(SCHEMA)
    bad = {"not": {}}
    error = refused(served, output_config={"format": {"type": "json_schema", "schema": bad}})
    assert error["message"].startswith("output_config.format cannot be followed: Unimplemented keys")
    told = served.error({"input": "hi", "text": {"format": {**FORMAT, "schema": bad}}}, path=RESPONSES)
    assert told["message"].startswith("text.format cannot be followed: Unimplemented keys")
    assert told["param"] == "text.format"
    told = served.error({"input": "hi", "text": {"format": {"type": "json_schema"}}}, path=RESPONSES)
    assert told["message"].startswith("text.format must be an object with a name and a schema")


def test_a_tool_that_must_be_used(served: Served) -> None:
    tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("now", "then")]
    message(served, tools=tools, tool_choice={"type": "any"})
    either = served.ring.last.sampling.grammar
    message(served, tools=tools, tool_choice={"type": "tool", "name": "then"})
    named = served.ring.last.sampling.grammar
    assert "now" in either
    assert "then" in either
    assert "now" not in named
    assert "then" in named


MARK = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize("path", ["/v1/chat/completions", MESSAGES, RESPONSES])
def test_marks_of_a_cache_change_no_token(served: Served, path: str) -> None:
    def prompt(mark: dict[str, Any], said: dict[str, Any]) -> list[int]:
        schema = {"type": "object", "properties": {}}
        kind = "input_text" if path == RESPONSES else "text"
        content = [{"type": kind, "text": "hi", **mark}]
        answer = [{"type": "output_text" if path == RESPONSES else "text", "text": "ho", **said}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": content})
        tool: dict[str, Any]
        if path == MESSAGES:
            tool = {"name": "now", "input_schema": schema}
            fields: dict[str, Any] = {"messages": messages, "system": content, "max_tokens": 5, **mark}
        elif path == RESPONSES:
            tool = {"type": "function", "name": "now", "parameters": schema}
            fields = {"input": messages}
        else:
            tool = {"type": "function", "function": {"name": "now", "parameters": schema}}
            fields = {"messages": [message | mark for message in messages], **mark}
        served.post(path, {**fields, "tools": [tool | mark]})
        return served.ring.prompts[served.ring.last.session]

    cited = MARK | {"citations": [{"type": "char_location", "cited_text": "x"}]}
    assert prompt(MARK, cited) == prompt({}, {})


def test_a_refusal_is_what_the_assistant_said(served: Served) -> None:
    for part in ({"type": "text", "text": "no"}, {"type": "refusal", "refusal": "no"}):
        served.post(
            "/v1/chat/completions", {"messages": [*HI, {"role": "assistant", "content": [part]}, *HI]}
        )
    first, second = (served.ring.prompts[spec.session] for spec in served.ring.opened)
    assert first == second


# -- Responses ----------------------------------------------------------------------------------------


def test_a_response(served: Served) -> None:
    told = served.openai.responses.create(
        model="tiny", input="hi", max_output_tokens=5, temperature=0.5, metadata={"a": "b"}, store=True
    )
    assert told.output_text == "Hello"
    assert told.status == "incomplete"
    assert told.incomplete_details is not None
    assert told.incomplete_details.reason == "max_output_tokens"
    assert (told.metadata, told.temperature, told.max_output_tokens) == ({"a": "b"}, 0.5, 5)
    assert told.model_dump()["store"] is False
    assert told.usage is not None
    assert told.usage.input_tokens == served.ring.last.prompt_tokens
    assert served.ring.last.sampling.temperature == 0.5


def test_a_streamed_response_is_the_same(served: Served) -> None:
    whole = served.openai.responses.create(model="tiny", input="hi")
    with served.openai.responses.stream(model="tiny", input="hi") as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert streamed.output_text == whole.output_text == "Hello, world."
    assert streamed.usage == whole.usage


def test_a_response_can_be_sent_back(served: Served) -> None:
    first = served.openai.responses.create(model="tiny", input="hi", instructions="Be brief.")
    turn: Any = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "and?"}]
    second = served.openai.responses.create(model="tiny", input=turn)
    assert second.usage is not None
    counted = served.openai.responses.input_tokens.count(model="tiny", input=turn)
    assert counted.input_tokens == second.usage.input_tokens


@pytest.mark.parametrize("path", [RESPONSES, f"{RESPONSES}/input_tokens"])
def test_refusals_of_a_prompt_name_the_input(refusing: Served, path: str) -> None:
    error = refusing.error({"input": "x" * 2_100_000}, path=path)
    assert "tokens in your input. Please shorten the input to less than 600 tokens." in error["message"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


def test_what_would_need_a_store_is_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing is stored here; send the whole conversation"):
        served.openai.responses.create(model="tiny", input="hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        served.openai.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="the served model is 'tiny'"):
        served.openai.responses.create(model="gpt-5", input="hi")


def test_a_failing_response_is_an_error_event(served: Served) -> None:
    served.ring.error, served.ring.error_at = "stage 1 ran out of memory", 3
    with pytest.raises(openai.APIError, match="stage 1 ran out of memory"):
        list(served.openai.responses.create(model="tiny", input="hi", stream=True))
    name, data = events(served, RESPONSES, {"input": "hi"})[-1]
    assert (name, data["message"], data["code"]) == ("error", "stage 1 ran out of memory", "internal_error")
