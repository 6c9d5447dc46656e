"""Agents of other people that call tools through a real ring: in Messages, in Responses and in chats."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ring_processes import RingProcesses
from tests.talking_model import write_talking_model
from tests.test_whole_ring_tools import ANSWERS, TEMPLATE

ASKED = "Will it rain in Köln?"
ANSWER = "Rain in Köln for two days."
CALLED: list[Any] = [("Köln", 2), ()]  # with what the functions below were called
pytestmark = [pytest.mark.long]


def needs(module: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(is_missing, reason=f"{module} is not installed (extra long)")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("ring")
    model = write_talking_model(directory / "tiny", ANSWERS, TEMPLATE, num_layers=5)
    layers = [(0, 2), (2, 3), (3, 5)]
    with RingProcesses(directory, model, layers, context=1200, with_api=True) as ring:
        yield ring.wait_api()


@needs("anthropic")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_tool_runner_of_anthropic(url: str, is_streamed: bool) -> None:
    from anthropic import Anthropic, beta_tool

    called: list[Any] = []

    @beta_tool
    def get_weather(city: str, days: int = 1) -> str:
        """The weather."""
        called.append((city, days))
        return "ok"

    @beta_tool
    def now() -> str:
        """The time."""
        called.append(())
        return "8"

    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            model="tiny",
            max_tokens=300,
            messages=[{"role": "user", "content": ASKED}],
            tools=[get_weather, now],
            stream=is_streamed,
            thread=False,
            extra_body={"temperature": 0},
        )
        last: Any = runner.until_done()
    assert called == CALLED
    assert [block.text for block in last.content] == [ANSWER]


@needs("agents")
@pytest.mark.parametrize("kind", ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def test_an_agent_of_openais_sdk(url: str, kind: str) -> None:
    import agents
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)
    called: list[Any] = []

    @agents.function_tool
    def get_weather(city: str, days: int) -> str:
        called.append((city, days))
        return "ok"

    @agents.function_tool
    def now() -> str:
        called.append(())
        return "8"

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            agent: Any = agents.Agent(
                name="agent",
                instructions="Be brief.",
                tools=[get_weather, now],
                model=getattr(agents, kind)(model="tiny", openai_client=client),
                model_settings=agents.ModelSettings(temperature=0, max_tokens=300),
            )
            whole = await agents.Runner.run(agent, ASKED)
            streamed = agents.Runner.run_streamed(agent, ASKED)
            async for _ in streamed.stream_events():
                pass
            return [whole.final_output, streamed.final_output]

    assert asyncio.run(ask()) == [ANSWER, ANSWER]
    assert called == CALLED * 2
