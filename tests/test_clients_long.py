"""Clients as they are, in front of a real ring: LangChain's ChatOpenAI, and Simon Willison's `llm`."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client_ring import KEY, serving_with_key

CONTEXT = 300
pytestmark = [pytest.mark.long]


def needs(module: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(is_missing, reason=f"{module} is not installed (extra long)")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_with_key(tmp_path_factory.mktemp("ring"), context=CONTEXT) as url:
        yield url


# -- LangChain ----------------------------------------------------------------------------------------


def chat_openai(url: str, **fields: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model="tiny", base_url=f"{url}/v1", api_key=KEY, max_retries=0, max_tokens=12, temperature=0, **fields
    )


@pytest.fixture
def langchain(url: str) -> Iterator[Any]:
    with httpx.Client() as http:
        yield chat_openai(url, http_client=http)


@needs("langchain_openai")
def test_langchain_invokes_streams_and_batches(langchain: Any) -> None:
    whole = langchain.invoke("hi")
    assert whole.usage_metadata["output_tokens"] == 12
    assert whole.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in langchain.stream("hi")) == whole.content
    chunks = list(langchain.stream("hi", stream_usage=True))
    assert [c.usage_metadata for c in chunks if c.usage_metadata][-1]["total_tokens"] == 17
    assert [answer.content for answer in langchain.batch(["hi", "hi"])] == [whole.content] * 2


@needs("langchain_openai")
def test_langchain_async_is_the_same(langchain: Any, url: str) -> None:
    async def both() -> tuple[str, str]:
        async with httpx.AsyncClient() as http:
            chat = chat_openai(url, http_async_client=http)
            whole = await chat.ainvoke("hi")
            return whole.content, "".join([chunk.content async for chunk in chat.astream("hi")])

    whole, streamed = asyncio.run(both())
    assert whole == streamed == langchain.invoke("hi").content


@needs("langchain_openai")
def test_langchain_sends_answers_back_and_binds_parameters(langchain: Any) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    turn = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "one"}]),
        AIMessage([{"type": "text", "text": "two"}]),
        langchain.invoke("hi"),
        HumanMessage("three"),
    ]
    assert langchain.invoke(turn).response_metadata["model_name"] == "tiny"
    bound = langchain.bind(stop=["#"], logprobs=True, seed=3, frequency_penalty=0.1, presence_penalty=0.1)
    assert len(bound.invoke("hi").response_metadata["logprobs"]["content"]) == 12


@needs("langchain_openai")
def test_langchain_is_refused_by_name(langchain: Any) -> None:
    from openai import BadRequestError

    schema = {"title": "T", "type": "object", "properties": {"a": {"not": {}}}}
    with pytest.raises(BadRequestError, match="response_format cannot be followed: Unimplemented keys"):
        langchain.with_structured_output(schema, method="json_schema").invoke("hi")


@needs("langchain_openai")
def test_langchain_gets_what_its_schema_says(langchain: Any) -> None:
    schema = {
        "title": "T",
        "type": "object",
        "properties": {"a": {"enum": ["red", "blue"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    roomy = langchain.model_copy(update={"max_tokens": 200})
    found = roomy.with_structured_output(schema, method="json_schema").invoke("hi")
    assert found in ({"a": "red"}, {"a": "blue"})


# -- llm ----------------------------------------------------------------------------------------------


class Llm:
    """The `llm` command with a home of its own, set up as docs/clients.md says."""

    def __init__(self, home: Path, url: str) -> None:
        self._home = home
        (home / "extra-openai-models.yaml").write_text(
            f"- model_id: ring\n  model_name: tiny\n  api_base: {url}/v1\n  api_key_name: macrame\n"
        )
        self.run("keys", "set", "macrame", "--value", KEY)

    def run(self, *arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"LLM_USER_PATH": str(self._home), "LLM_LOAD_PLUGINS": ""},
        )
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture
def llm(tmp_path: Path, url: str) -> Llm:
    return Llm(tmp_path, url)


@needs("llm")
def test_llm_streams_and_goes_on(llm: Llm) -> None:
    ask = ("-m", "ring", "-o", "max_tokens", "9", "-o", "temperature", "0")
    streamed = llm.run(*ask, "-u", "hi")
    assert "5 input, 9 output" in streamed.stderr
    assert llm.run(*ask, "--no-stream", "hi").stdout == streamed.stdout
    assert llm.run(*ask, "--async", "hi").stdout == streamed.stdout
    llm.run("-c", "-o", "max_tokens", "3", "and?")  # sends its own log of the answer back
    llm.run(*ask, "-s", "Be brief.", "hi")
    chat = llm.run("chat", *ask, stdin="hi\nagain\nexit\n")
    assert "Chatting with ring" in chat.stdout


@needs("llm")
def test_llm_shows_our_sentence(llm: Llm) -> None:
    refused = llm.run("-m", "ring", "-o", "max_tokens", "900", "hi", code=1)
    assert "maximum context length is 300 tokens" in refused.stderr
    answered = llm.run("-m", "ring", "-o", "json_object", "1", "-o", "max_tokens", "20", "hi")
    assert answered.stdout.startswith("{")
