"""Answers of a fixed form from a real ring of three stages and the demo model, which would not say JSON."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tests.ring_processes import RingProcesses

pytestmark = pytest.mark.long

MODEL = Path(__file__).parent.parent / "deploy" / "demo" / "model"
LAYERS = [(0, 3), (3, 5), (5, 9)]
NUM_USERS = 8
GREEDY: dict[str, Any] = {"temperature": 0}
SHARP: dict[str, Any] = {"temperature": 1, "seed": 2, "extra_body": {"top_k": 20}}
WAYS = [
    GREEDY,
    {"temperature": 1, "seed": 5},
    {"temperature": 1, "seed": 6, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.01}},
]


class Strict(BaseModel):
    """What OpenAI's strict mode wants: no other properties."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Colour(enum.Enum):
    """With letters that take several tokens."""

    RED = "röd"
    BLUE = "青い"
    NONE = "keine"


class Address(Strict):
    street: Annotated[str, Field(max_length=20)]
    number: Annotated[int, Field(ge=1, le=999)]
    position: Annotated[list[Annotated[float, Field(ge=-180, le=180)]], Field(min_length=2, max_length=2)]


class Person(Strict):
    name: Annotated[str, Field(pattern="^[A-ZÄÖÜ][a-zäöüß]{2,8}$")]
    words: Annotated[str, Field(max_length=30)]
    is_here: bool
    colours: Annotated[list[Colour], Field(min_length=1, max_length=3)]
    home: Address
    other: Address | None


class Circle(Strict):
    kind: Literal["circle"]
    radius: Annotated[int, Field(ge=0, le=99)]


class Box(Strict):
    kind: Literal["böx"]
    sides: Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(min_length=2, max_length=3)]


class Drawing(Strict):
    shapes: Annotated[list[Circle | Box], Field(min_length=1, max_length=2)]


class Node(Strict):
    """It refers to itself."""

    value: Annotated[int, Field(ge=0, le=9)]
    next: Node | None


MODELS: list[type[Strict]] = [Person, Drawing, Address]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("ring")
    with RingProcesses(directory, MODEL, LAYERS, with_api=True, context=2048, concurrency=NUM_USERS) as ring:
        yield ring.wait_api()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100.0) as one:
        yield one


def asked(model: type[Strict], **fields: Any) -> dict[str, Any]:
    schema = {"name": model.__name__, "strict": True, "schema": model.model_json_schema()}
    return {
        "model": "model",
        "messages": [{"role": "user", "content": "def parse(text):"}],
        "max_tokens": 400,
        "response_format": {"type": "json_schema", "json_schema": schema},
        **fields,
    }


def answer(client: openai.OpenAI, body: dict[str, Any], *, is_streamed: bool) -> str:
    """The text of an answer that ended by itself."""
    if not is_streamed:
        choice = client.chat.completions.create(**body).choices[0]
        assert choice.finish_reason == "stop"
        return choice.message.content or ""
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**body, stream=True)]
    assert chunks[-1].finish_reason == "stop"
    return "".join(chunk.delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "random", "filtered"])
@pytest.mark.parametrize("model", MODELS)
def test_an_answer_is_what_its_schema_says(
    client: openai.OpenAI, model: type[Strict], way: dict[str, Any]
) -> None:
    """Nested objects, enums, lists, bounded numbers, patterns and letters beyond ASCII, $ref and anyOf."""
    whole = answer(client, asked(model, **way), is_streamed=False)
    model.model_validate_json(whole)
    assert answer(client, asked(model, **way), is_streamed=True) == whole


def test_a_schema_may_refer_to_itself(client: openai.OpenAI) -> None:
    Node.model_validate_json(answer(client, asked(Node, **GREEDY), is_streamed=False))


def test_the_client_parses_its_own_models(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**asked(Drawing, **WAYS[1]) | {"response_format": Drawing})
    assert isinstance(parsed.choices[0].message.parsed, Drawing)


def test_any_object(client: openai.OpenAI) -> None:
    for way in (SHARP, {"seed": 5, "top_p": 0.5}):
        body = asked(Node, **way) | {"response_format": {"type": "json_object"}}
        assert isinstance(json.loads(answer(client, body, is_streamed=False)), dict)


def test_an_answer_that_is_cut_is_the_beginning_of_one(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**asked(Person, max_tokens=12, **GREEDY)).choices[0]
    assert choice.finish_reason == "length"
    assert (choice.message.content or "").lstrip().startswith('{"name"')


def test_many_users_at_once(client: openai.OpenAI) -> None:
    """Each with a schema of their own, streamed or not, some without any."""

    def use(user: int) -> None:
        model, way = MODELS[user % len(MODELS)], WAYS[user % 2]
        if user % 4 == 3:
            body = asked(model, **way, max_tokens=60)
            del body["response_format"]
            assert client.chat.completions.create(**body).choices[0].message.content
            return
        model.model_validate_json(answer(client, asked(model, **way), is_streamed=bool(user % 2)))

    with ThreadPoolExecutor(NUM_USERS) as pool:
        for done in [pool.submit(use, user) for user in range(2 * NUM_USERS)]:
            done.result()


def test_all_choices_of_a_request(client: openai.OpenAI) -> None:
    answered = client.chat.completions.create(**asked(Address, seed=3), n=3)
    texts = [choice.message.content or "" for choice in answered.choices]
    assert len(set(texts)) == 3
    TypeAdapter(list[Address]).validate_json(f"[{','.join(texts)}]")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "locate"}}])
def test_a_tool_is_called_because_it_must(client: openai.OpenAI, choice: Any) -> None:
    functions = {"locate": Address, "draw": Drawing}
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": model.model_json_schema()}}
        for name, model in functions.items()
    ]
    body = asked(Node, **WAYS[1], tools=tools, tool_choice=choice, parallel_tool_calls=False)
    del body["response_format"]
    answered = client.chat.completions.create(**body).choices[0]
    assert answered.finish_reason == "tool_calls"
    (call,) = answered.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "locate" or choice == "required"
    functions[call.function.name].model_validate_json(call.function.arguments)
    with client.chat.completions.stream(**body) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments


def test_the_other_dialects_keep_to_it_too(client: openai.OpenAI, url: str) -> None:
    """OpenAI's Responses and Anthropic's Messages, by their own packages."""
    anthropic = pytest.importorskip("anthropic")
    said = "def parse(text):"
    response = client.responses.parse(
        model="model", input=said, text_format=Address, temperature=0, max_output_tokens=400
    )
    assert isinstance(response.output_parsed, Address)
    tool: Any = {"name": "locate", "input_schema": Address.model_json_schema()}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=100.0) as other:
        message = other.messages.create(
            model="model",
            messages=[{"role": "user", "content": said}],
            max_tokens=400,
            tools=[tool],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            extra_body={"temperature": 0},
        )
    assert message.stop_reason == "tool_use"
    (block,) = [block for block in message.content if block.type == "tool_use"][:1]
    Address.model_validate_json(json.dumps(block.input))


def test_choices_and_expressions(client: openai.OpenAI) -> None:
    """vLLM's fields, for texts as well."""

    def complete(**fields: Any) -> str:
        done = client.completions.create(
            model="model", prompt="def f", max_tokens=30, temperature=1, seed=1, extra_body=fields
        )
        assert done.choices[0].finish_reason == "stop"
        return done.choices[0].text

    assert complete(guided_choice=["ja", "näin", "no"]) in ("ja", "näin", "no")
    assert re.fullmatch(r"[a-f]{3}-\d\d", complete(guided_regex=r"[a-f]{3}-\d\d"))
    assert complete(structured_outputs={"regex": "abc"}) == "abc"


def test_an_end_that_is_ignored_is_followed_by_nothing(client: openai.OpenAI) -> None:
    fields = {"guided_regex": "abc", "ignore_eos": True}
    done = client.completions.create(model="model", prompt="def f", max_tokens=20, extra_body=fields)
    assert (done.choices[0].finish_reason, done.choices[0].text) == ("length", "abc")


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI) -> None:
    """What the grammar forbids is drawn by nobody, but the model's opinion is told."""
    body = asked(Address, **GREEDY, logprobs=True, top_logprobs=3)
    choice = client.chat.completions.create(**body).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert any(token.token not in [top.token for top in token.top_logprobs] for token in tokens)
    assert all(token.logprob > -9999 for token in tokens)
