"""POST /v1/embeddings in front of a scripted ring, whose vectors begin with the tokens that it was given."""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from cluster.api.embeddings import MAX_AT_ONCE
from cluster.api.embeddings_body import MAX_INPUTS
from tests.api_server import Served, chat_body, serving
from tests.embedding_models import end_texts, write_embedding_files
from tests.scripted_ring import CONTEXT, MAX_QUEUED, WIDTH
from tests.tiny_models import EOS_ID, VOCAB_SIZE
from tests.waiting import wait_for

PATH = "/v1/embeddings"
ENDLESS = chat_body(max_tokens=500, extra_body={"ignore_eos": True})
MOST = 40  # tokens, by the model's files
PREFIX = "A: "


def embedding_model(folder: Path) -> None:
    end_texts(write_embedding_files(folder, "mean", width=WIDTH))


def particular(folder: Path) -> None:
    """Files that say more of how texts are prepared."""
    embedding_model(folder)
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": MOST, "do_lower_case": True})
    )
    prompts = {"prompts": {"query": PREFIX}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


@pytest.fixture(scope="module")
def shared_embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("embedding"), change=embedding_model) as served:
        yield served


@pytest.fixture
def embedding(shared_embedding: Served) -> Served:
    shared_embedding.ring.reset()
    return shared_embedding


def expected(tokens: list[int], width: int = WIDTH) -> list[float]:
    return [float(np.float32(number)) for number in [*tokens, *[0.1] * WIDTH][:width]]


def test_a_text(embedding: Served) -> None:
    told = embedding.openai.embeddings.create(model="tiny", input="hi", user="u")
    assert [one.embedding for one in told.data] == [expected([*b"hi", EOS_ID])]
    assert (told.object, told.data[0].object, told.model) == ("list", "embedding", "tiny")
    assert (told.usage.prompt_tokens, told.usage.total_tokens) == (3, 3)
    spec = embedding.ring.last
    assert (spec.prompt_tokens, spec.max_tokens) == (3, 0)
    pooling = spec.sampling.pooling
    assert (pooling.kind, pooling.dimensions, pooling.is_normalised) == (pooling.MEAN, 0, True)
    embedding.ring.wait_empty()


def test_numbers_and_base64_are_the_same(embedding: Served) -> None:
    body = {"model": "tiny", "input": "hi"}
    numbers = embedding.post(PATH, body)["data"][0]["embedding"]
    assert numbers == embedding.post(PATH, body | {"encoding_format": "float"})["data"][0]["embedding"]
    packed = embedding.post(PATH, body | {"encoding_format": "base64"})["data"][0]["embedding"]
    told = embedding.openai.embeddings.create(**body, encoding_format="base64")  # type: ignore[arg-type]
    assert told.data[0].embedding == packed  # type: ignore[comparison-overlap]
    assert numbers == embedding.openai.embeddings.create(**body).data[0].embedding  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (["a", "bc"], [[97, EOS_ID], [98, 99, EOS_ID]]),
        ([5, 6], [[5, 6]]),  # as they are
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["a", [7]], [[97, EOS_ID], [7]]),
    ],
)
def test_lists(embedding: Served, given: Any, tokens: list[list[int]]) -> None:
    told = embedding.post(PATH, {"input": given})
    assert [one["embedding"] for one in told["data"]] == [expected(ids) for ids in tokens]
    assert [one["index"] for one in told["data"]] == list(range(len(tokens)))
    assert told["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_a_long_list_goes_a_few_at_a_time(embedding: Served) -> None:
    texts = [f"text {i}" for i in range(300)]
    told = embedding.openai.embeddings.create(model="tiny", input=texts)
    assert [one.embedding for one in told.data] == [expected([*text.encode(), EOS_ID]) for text in texts]
    assert 1 < embedding.ring.most_at_once <= min(MAX_AT_ONCE, 4 + MAX_QUEUED)
    embedding.ring.wait_empty()


def test_a_long_list_makes_do_with_the_room_that_others_leave(embedding: Served) -> None:
    embedding.ring.delay_s = 0.005  # two answers of more than a second, which take two places of four
    chats = [embedding.openai.chat.completions.create(**ENDLESS, model="tiny", stream=True) for _ in range(2)]
    for chat in chats:
        next(chat)
    told = embedding.openai.embeddings.create(model="tiny", input=["a", "b", "c"] * 10)
    assert [one.embedding[0] for one in told.data] == [97, 98, 99] * 10
    running = [one["id"] for one in embedding.http.get("/v1/cluster").json()["requests"]]
    assert sum(name.startswith("chatcmpl-") for name in running) == 2
    for chat in chats:
        chat.close()
    embedding.ring.wait_empty()


def test_fewer_dimensions(embedding: Served) -> None:
    told = embedding.openai.embeddings.create(model="tiny", input="hello", dimensions=3)
    assert told.data[0].embedding == expected([*b"hel"], 3)
    error = embedding.error({"input": "hi", "dimensions": WIDTH + 1}, path=PATH)
    assert error["message"] == (
        f"dimensions is {WIDTH + 1}, but this model's embeddings have {WIDTH}: ask for so many, or fewer."
    )
    assert error["param"] == "dimensions"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "input is missing."),
        ({"input": ""}, "input is empty."),
        ({"input": []}, "input is empty."),
        ({"input": ["a", ""]}, "input is empty."),
        ({"input": [[]]}, "input is empty."),
        ({"input": 5}, "input must be a text, a list of texts, or token ids."),
        ({"input": [{}]}, "input must be a text, a list of texts, or token ids."),
        ({"input": [5, "a"]}, "input: element 1 is not a token id (a whole number)."),
        (
            {"input": [VOCAB_SIZE]},
            f"input: the token id {VOCAB_SIZE} is not in the vocabulary (0 to {VOCAB_SIZE - 1}).",
        ),
        (
            {"input": "a" * CONTEXT},
            f"This model reads at most {CONTEXT} tokens of an input, but one has {CONTEXT + 1}. Please "
            "shorten it, or send it in parts.",
        ),
        (
            {"input": ["a"] * (MAX_INPUTS + 1)},
            f"input has {MAX_INPUTS + 1} elements, and {MAX_INPUTS} are allowed: send several requests.",
        ),
        ({"input": "a", "dimensions": 0}, "dimensions: the value should be greater than or equal to 1."),
        (
            {"input": "a", "encoding_format": "hex"},
            "encoding_format: the value should be 'float' or 'base64'.",
        ),
        ({"input": "a", "input_type": "query"}, "input_type is not a field of this request."),
    ],
)
def test_wrong_requests(embedding: Served, fields: dict[str, Any], message: str) -> None:
    assert embedding.error(fields, path=PATH)["message"] == message
    assert not embedding.ring.opened


def test_a_text_that_just_fits(embedding: Served) -> None:
    assert embedding.post(PATH, {"input": "a" * (CONTEXT - 1)})["usage"]["prompt_tokens"] == CONTEXT


def test_a_failing_stage_is_told(embedding: Served) -> None:
    embedding.ring.error = "stage 1 ran out of memory"
    with pytest.raises(openai.InternalServerError, match="stage 1 ran out of memory"):
        embedding.openai.embeddings.create(model="tiny", input=["a", "b"])
    embedding.ring.wait_empty()


def num_left(served: Served) -> int:
    found = re.search(
        r"^macrame_client_disconnects_total (\d+)", served.http.get("/metrics").text, re.MULTILINE
    )
    assert found is not None
    return int(found[1])


def test_a_client_that_leaves_frees_all_its_texts(embedding: Served) -> None:
    before = num_left(embedding)
    embedding.ring.delay_s = 0.05
    body = json.dumps({"input": ["a"] * 200}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", embedding.api.port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

        def some_are_read() -> bool:
            if select.select([client], [], [], 0)[0]:
                pytest.fail(f"answered at once: {client.recv(4096)!r}")
            return len(embedding.ring.opened) > 1

        wait_for(some_are_read, 10.0, "some are read")
    wait_for(lambda: num_left(embedding) == before + 1, 10.0, "that it left is noticed")
    embedding.ring.wait_empty(10.0)
    assert len(embedding.ring.opened) < 200


def test_how_the_files_say_that_texts_are_prepared(tmp_path: Path) -> None:
    with serving(tmp_path, change=particular) as served:
        told = served.post(PATH, {"input": "Hi"})
        assert told["data"][0]["embedding"] == expected([*b"a: hi", EOS_ID])
        told = served.error({"input": [3] * (MOST + 1)}, path=PATH)
        assert told["message"].startswith(
            f"This model reads at most {MOST} tokens of an input, but one has 41."
        )


def test_a_model_without_these_files_refuses_in_a_sentence(refusing: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="'tiny' gives no embeddings: its files have no modules"):
        refusing.openai.embeddings.create(model="tiny", input="hi")
    with pytest.raises(openai.NotFoundError, match="the served model is 'tiny'"):
        refusing.openai.embeddings.create(model="text-embedding-3-small", input="hi")


@pytest.mark.long
def test_langchain(embedding: Served) -> None:
    from langchain_openai import OpenAIEmbeddings
    from pydantic import SecretStr

    client = OpenAIEmbeddings(
        model="tiny",
        base_url=f"{embedding.api.url}/v1",
        api_key=SecretStr("none"),
        check_embedding_ctx_length=False,
    )
    texts = ["Hello", "Goodbye"]
    assert client.embed_documents(texts) == [expected([*text.encode(), EOS_ID]) for text in texts]
    assert client.embed_query("Hello") == expected([*b"Hello", EOS_ID])
