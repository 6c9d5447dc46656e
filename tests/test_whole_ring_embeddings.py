"""Embeddings through real rings: bit for bit those of plain mlx-lm, which reads the same chunks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.embedding_models import PlainModel, write_embedding_model
from tests.reference import greedy_of
from tests.ring_processes import RingProcesses
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
        ("llama", THREE, "cls", {"overrides": MISTRAL, "has_head": False, "is_bare": True}),
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
        ring.wait_status(lambda s: s.num_active == 0 and all(r.node.num_sessions == 0 for r in s.ranks))
