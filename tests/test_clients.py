"""Clients as they are, in front of a real ring: the openai package, and the requests of Open WebUI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests import open_webui
from tests.client_ring import KEY, serving_with_key

CONTEXT = 128
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_with_key(tmp_path_factory.mktemp("ring"), context=CONTEXT) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def webui(url: str) -> Iterator[httpx.Client]:
    """As Open WebUI's server asks: base URL with /v1, its own headers."""
    headers = {**open_webui.HEADERS, "Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"{url}/v1", headers=headers, timeout=60.0) as http:
        yield http


# -- the openai package -------------------------------------------------------------------------------


def test_openai_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "macrame")
    assert client.models.retrieve("tiny") == model


def test_openai_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HI, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_openai_answers_can_be_sent_back(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 5}
    said = client.chat.completions.create(messages=HI, **fields).choices[0].message
    turn: Any = [*HI, said, {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(messages=turn, **fields).choices[0].message.role == "assistant"


def test_openai_async(url: str) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            fields: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 8, "temperature": 0}
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**fields),
                client.chat.completions.create(**fields, stream=True),
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [whole.choices[0].message.content or "", text]

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_openai_errors_are_of_its_own_kinds(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="the served model is 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=HI)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens") as caught:
        client.chat.completions.create(model="tiny", messages=HI, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="missing or wrong"),
    ):
        stranger.models.list()


def test_openai_responses_are_the_chats_tokens(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, temperature=0)
    fields: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**fields)
    assert whole.output_text == chat.choices[0].message.content
    events = list(client.responses.create(**fields, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.usage == whole.usage


# -- Open WebUI ---------------------------------------------------------------------------------------


def test_open_webui_verifies_a_connection(webui: httpx.Client, url: str) -> None:
    models = webui.get("/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
    refused = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401
    assert "API key" in refused.json()["error"]["message"]  # what it shows its user


@pytest.mark.parametrize("name", open_webui.CHATS)
def test_open_webui_chats(webui: httpx.Client, name: str) -> None:
    body = open_webui.CHATS[name]
    reply = webui.post("/chat/completions", content=json.dumps(body))
    assert reply.status_code == 200, reply.text
    if not body["stream"]:
        assert reply.json()["choices"][0]["message"]["role"] == "assistant"
        return
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in reply.text.split("\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"])
    assert ("total_tokens" in (chunks[-1].get("usage") or {})) == ("stream_options" in body)


@pytest.mark.parametrize("name", open_webui.TASKS)
def test_open_webui_tasks(webui: httpx.Client, name: str) -> None:
    reply = webui.post("/chat/completions", content=json.dumps(open_webui.TASKS[name]))
    assert reply.status_code == 200, reply.text
    assert isinstance(reply.json()["choices"][0]["message"]["content"], str)


def test_open_webui_is_told_that_images_are_not_read(webui: httpx.Client) -> None:
    reply = webui.post("/chat/completions", content=json.dumps(open_webui.WITH_IMAGE))
    assert reply.status_code == 400
    assert "only text parts are" in reply.json()["error"]["message"]
