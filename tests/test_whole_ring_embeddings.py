"""Embeddings through real rings: bit for bit those of plain mlx-lm, which reads the same chunks."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from proto import head_pb2
from tests.api_server import chat_body
from tests.embedding_models import PlainModel, write_embedding_model
from tests.hub_server import HubServer
from tests.reference import greedy_of
from tests.ring_processes import RingProcesses
from tests.test_whole_ring_fetch import homes
from tests.tiny_models import EOS_ID

CHUNK = 32
THREE = [(0, 2), (2, 3), (3, 5)]
ONE = [(0, 5)]
LONG = partial(pytest.param, marks=pytest.mark.long)
TEXTS = [
    "hi",
    "The quick brown fox jumps over the lazy dog. " * 5,
    "x" * (2 * CHUNK - 1),  # with the token behind it whole chunks
    "a",
]
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
MISTRAL = UNTIED | {"model_type": "mistral"}


def tokens(text: str) -> list[int]:
    """The tiny tokenizer's: bytes, and the token that its post-processor adds."""
    return [*text.encode(), EOS_ID]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0)


@pytest.mark.parametrize(
    ("arch", "layers", "pooling", "model"),
    [
        ("qwen3", THREE, "lasttoken", {"is_bare": True}),
        ("llama", ONE, "mean", {"has_head": False}),
        LONG("llama", THREE, "cls", {"overrides": MISTRAL, "has_head": False, "is_bare": True}),
        LONG("qwen3", ONE, "mean", {"overrides": UNTIED}),
        LONG("llama", THREE, "mean", {"is_normalised": False}),
        LONG("qwen3", THREE, "lasttoken", {"overrides": UNTIED, "has_head": False}),
        LONG("gemma3_text", THREE, "mean", {}),
        LONG("mamba2", THREE, "lasttoken", {}),
    ],
)
def test_embeddings_are_those_of_mlx_lm(
    arch: str, layers: list[tuple[int, int]], pooling: str, model: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_embedding_model(arch, tmp_path / "tiny", pooling=pooling, **model)
    plain, has_head = PlainModel(arch, overrides=model.get("overrides")), model.get("has_head", True)
    of = partial(plain.vector, chunk=CHUNK, pooling=pooling, is_normalised=model.get("is_normalised", True))
    expected = [of(tokens(text)) for text in TEXTS]
    with (
        RingProcesses(tmp_path, folder, layers, with_api=True, prefill_chunk=CHUNK) as ring,
        ThreadPoolExecutor(4) as pool,
    ):
        embeddings = client_of(ring.wait_api()).embeddings
        others = [pool.submit(ring.tokens, [3, 5 + i], 60) for i in range(3 * has_head)]
        for _ in range(2):  # what was read of the first is of no use to the second
            told = embeddings.create(model="tiny", input=TEXTS)  # as base64: what this client asks for
            assert [one.index for one in told.data] == list(range(len(TEXTS)))
            assert [one.embedding for one in told.data] == expected
        assert told.usage.prompt_tokens == told.usage.total_tokens == sum(len(tokens(t)) for t in TEXTS)
        assert told.model == "tiny"
        ids = [tokens(text) for text in TEXTS]
        told = embeddings.create(model="tiny", input=ids, encoding_format="float", user="u")
        assert [one.embedding for one in told.data] == expected
        told = embeddings.create(model="tiny", input=ids[1], dimensions=10, encoding_format="float")
        assert [one.embedding for one in told.data] == [of(ids[1], dimensions=10)]
        for i, other in enumerate(others):
            assert other.result() == greedy_of(plain.model, [3, 5 + i], 60)[0]
        ring.wait_status(is_free)


def test_a_model_without_a_head_comes_from_a_hub(tmp_path: Path) -> None:
    """As e5-mistral lies there: what says that it is an embedding model must reach every node."""
    folder = write_embedding_model("llama", tmp_path / "there", pooling="cls", has_head=False, is_bare=True)
    plain = PlainModel("llama")
    with HubServer({"tests/ring": folder}) as hub:
        env_of = homes(tmp_path, hub, {0: "home0", 1: "home1"})
        layers = [(0, 2), (2, 5)]
        with RingProcesses(
            tmp_path, "tests/ring", layers, with_api=True, env_of=env_of, prefill_chunk=CHUNK
        ) as ring:
            url = ring.wait_api()
            client = client_of(url)
            for home in ("home0", "home1"):
                (found,) = (tmp_path / home).rglob("1_Pooling/config.json")
                assert found.read_bytes() == (folder / "1_Pooling" / "config.json").read_bytes()
            told = client.embeddings.create(model="tests/ring", input=TEXTS)
            assert [one.embedding for one in told.data] == [
                plain.vector(tokens(text), CHUNK, pooling="cls") for text in TEXTS
            ]
            with pytest.raises(openai.BadRequestError, match="without a head, so it writes no text: ask"):
                client.chat.completions.create(model="tests/ring", **chat_body())
            body = json.dumps({"input": ["a long text " * 30] * 500}).encode()
            with socket.create_connection(("127.0.0.1", ring.api_port)) as leaving:
                head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
                ring.wait_status(lambda status: status.num_active > 1)
            status = ring.wait_status(is_free)
            assert status.num_prompt_tokens < 500 * 361


def is_free(status: head_pb2.ClusterStatus) -> bool:
    """Nothing runs, and no stage holds a session."""
    return status.num_active == status.num_queued == sum(rank.node.num_sessions for rank in status.ranks) == 0
