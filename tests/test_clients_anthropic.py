"""The anthropic package as it is, in front of a real ring, and a prompt that takes long to read."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client_ring import KEY, serving_with_key

CONTEXT = 128
SLOW = {1: "layer_delay_ms=6000"}  # a prompt is two frames: its last token has one of its own
HI: Any = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {
    "model": "tiny",
    "messages": HI,
    "max_tokens": 12,
    "extra_body": {"temperature": 0},  # version 2 has no such parameter
}
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("anthropic") is None, reason="anthropic is not installed (extra long)"
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_with_key(tmp_path_factory.mktemp("ring"), context=CONTEXT) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    from anthropic import Anthropic

    with Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:  # as x-api-key
        yield client


def chat_text(url: str) -> str:
    """What the same chat is answered with by the other endpoint."""
    body = {"messages": HI, "max_tokens": 12, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60.0)
    return reply.json()["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def test_whole_and_streamed(client: Any, url: str) -> None:
    whole = client.messages.create(**GREEDY)
    assert whole.content[0].text == chat_text(url)
    assert whole._request_id
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)
    with client.messages.stream(**GREEDY) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == whole.content[0].text
    assert [block.text for block in streamed.content] == [text]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("max_tokens", 12)
    assert streamed.usage.input_tokens == whole.usage.input_tokens


def test_counting(client: Any) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=HI, system="Be brief.")
    said = client.messages.create(**GREEDY, system=[{"type": "text", "text": "Be brief."}])
    assert counted.input_tokens == said.usage.input_tokens


def test_an_answer_can_be_sent_back_and_gone_on_with(client: Any) -> None:
    said = client.messages.create(**GREEDY)
    turn = [*HI, {"role": said.role, "content": said.content}, {"role": "user", "content": "and?"}]
    assert client.messages.create(**{**GREEDY, "messages": turn}).role == "assistant"
    begun = said.content[0].text[:4]
    prefilled = [*HI, {"role": "assistant", "content": begun}]
    gone_on = client.messages.create(**{**GREEDY, "messages": prefilled, "max_tokens": 4})
    assert gone_on.content[0].text
    # The beginning is not said again.
    assert gone_on.usage.input_tokens == said.usage.input_tokens + len(begun.encode())


def test_async_is_the_same(url: str) -> None:
    from anthropic import AsyncAnthropic

    async def both() -> list[str]:
        async with AsyncAnthropic(base_url=url, auth_token=KEY, api_key=None, max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.messages.create(**GREEDY), client.messages.create(**GREEDY, stream=True)
            )
            text = [
                event.delta.text
                async for event in stream
                if event.type == "content_block_delta" and event.delta.type == "text_delta"
            ]
            return [whole.content[0].text, "".join(text)]  # type: ignore[union-attr]

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_an_answer_of_a_fixed_form(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    said = client.messages.create(**{**GREEDY, "max_tokens": 60}, output_config=form)
    assert json.loads(said.content[0].text) in ({"color": "red"}, {"color": "blue"})
    assert said.stop_reason == "end_turn"


def test_errors_are_of_its_own_kinds(client: Any, url: str) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="the served model is 'tiny'"):
        client.messages.create(**{**GREEDY, "model": "claude-sonnet-5"})
    long = [{"role": "user", "content": "x" * CONTEXT}]
    with pytest.raises(anthropic.BadRequestError, match="maximum context length is 128 tokens") as caught:
        client.messages.create(**{**GREEDY, "messages": long})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError, match="missing or wrong"),
    ):
        stranger.messages.create(**GREEDY)


def test_models(client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.max_input_tokens) == ("tiny", "model", CONTEXT)
    assert client.models.retrieve("tiny") == model


def test_a_long_prompt_is_not_a_dead_stream(tmp_path: Path) -> None:
    """With the real interval; in all shapes at once."""
    texts: dict[str, str] = {}

    def read(url: str, path: str, body: dict[str, Any]) -> None:
        fields = {"model": "tiny", "stream": True, **body}
        with httpx.Client(headers={"x-api-key": KEY}, timeout=12.0) as http:
            texts[path] = http.post(f"{url}/v1/{path}", json=fields).text

    with serving_with_key(tmp_path, context=CONTEXT, faults=SLOW) as url:
        bodies: dict[str, dict[str, Any]] = {
            "chat/completions": {"messages": HI, "max_tokens": 1},
            "messages": {"messages": HI, "max_tokens": 1},
        }
        threads = [threading.Thread(target=read, args=(url, *item)) for item in bodies.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts["chat/completions"].startswith(": keep-alive\n\n")
    assert texts["chat/completions"].endswith("data: [DONE]\n\n")
    assert texts["messages"].startswith("event: ping\n")
    assert texts["messages"].rstrip().endswith('{"type": "message_stop"}')
