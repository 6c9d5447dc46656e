"""The whole way: the openai client, the HTTP process, the head, and three real stages with uneven parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.api_server import COMPLETIONS, Stream
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import BOS_ID, write_checkpoint
from tests.waiting import is_in_time, wait_for

LAYERS = [(0, 2), (2, 3), (3, 5)]
NUM_TOKENS = 24
PROMPTS = ["def f(x):", "a", "naïve café", "0123456789" * 20]


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    with serving_ring(tmp_path_factory.mktemp("ring")) as processes:
        yield processes


@pytest.fixture
def http(ring: RingProcesses) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url(ring), timeout=60.0) as client:
        yield client


@contextmanager
def serving_ring(directory: Path) -> Iterator[RingProcesses]:
    """A ring whose HTTP process says that it is healthy."""
    model = write_checkpoint("qwen3", directory / "tiny", num_layers=5)
    with RingProcesses(directory, model, LAYERS, with_api=True) as processes:
        with httpx.Client(base_url=url(processes)) as client:
            wait_for(lambda: is_healthy(client), 60.0)
        yield processes


def url(ring: RingProcesses) -> str:
    return f"http://127.0.0.1:{ring.api_port}"


def is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def complete(http: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    reply = http.post(COMPLETIONS, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()  # type: ignore[no-any-return]


def expected(ring: RingProcesses, prompt: str) -> list[int]:
    return greedy(Path(ring.config["model"]), list(prompt.encode()), NUM_TOKENS)[0]


def num_sessions(ring: RingProcesses) -> int:
    return sum(ring.node_status(rank).num_sessions for rank in range(len(LAYERS)))


def test_greedy_tokens_are_those_of_mlx_lm(ring: RingProcesses, http: httpx.Client) -> None:
    for prompt in PROMPTS:
        choice = complete(http, prompt, return_token_ids=True)["choices"][0]
        assert choice["token_ids"] == expected(ring, prompt)
        assert choice["finish_reason"] == "length"


def test_users_at_once_get_what_each_alone_gets(ring: RingProcesses, http: httpx.Client) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(http, prompt, return_token_ids=True), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == expected(ring, prompt)
    together = complete(http, PROMPTS, return_token_ids=True)
    assert [choice["token_ids"] for choice in together["choices"]] == [expected(ring, p) for p in PROMPTS]


def test_a_stream_is_the_whole_answer(ring: RingProcesses, http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{url(ring)}/v1", api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {"model": "tiny", "seed": 5, "max_tokens": 30, "extra_body": {"top_k": 50}}
        messages: Any = [{"role": "user", "content": "hi"}]
        whole = client.chat.completions.create(messages=messages, **fields)
        stream = client.chat.completions.create(messages=messages, stream=True, **fields)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len([BOS_ID, 0, *b"hi", 0])
    assert text == whole.choices[0].message.content


def test_several_answers_to_one_prompt_read_it_once(ring: RingProcesses, http: httpx.Client) -> None:
    prompt = "several " * 30
    before = ring.wait_ok()
    answer = complete(http, prompt, n=3, return_token_ids=True)
    after = ring.wait_ok()
    assert [choice["token_ids"] for choice in answer["choices"]] == [expected(ring, prompt)] * 3
    assert after.num_cached_tokens - before.num_cached_tokens == 2 * (len(prompt) - 1)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}  # the first of them read it
    again = complete(http, prompt, n=2)["usage"]
    assert again["prompt_tokens_details"] == {"cached_tokens": again["prompt_tokens"] - 1}


def test_seeds_decide(http: httpx.Client) -> None:
    def ids(**fields: Any) -> list[int]:
        answer = complete(http, "x", temperature=1, return_token_ids=True, **fields)
        return answer["choices"][0]["token_ids"]  # type: ignore[no-any-return]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert ids() != ids()
    several = complete(http, "x", temperature=1, seed=1, n=2, return_token_ids=True)["choices"]
    assert [choice["token_ids"] for choice in several] == [ids(seed=1), ids(seed=2)]


def test_logprobs_of_greedy_tokens(ring: RingProcesses, http: httpx.Client) -> None:
    logprobs = complete(http, "def", logprobs=3)["choices"][0]["logprobs"]
    tokens, wanted = greedy(Path(ring.config["model"]), list(b"def"), NUM_TOKENS)
    assert logprobs["token_logprobs"] == pytest.approx(wanted, abs=1e-5)
    assert len(logprobs["tokens"]) == len(tokens)
    for logprob, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert max(top.values()) == logprob


def test_clients_that_leave_free_every_stage(ring: RingProcesses, http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    with http.stream("POST", COMPLETIONS, json=body | {"stream": True}) as reply:
        parts = reply.iter_raw()
        next(parts)
        assert num_sessions(ring) == len(LAYERS)
    wait_for(lambda: num_sessions(ring) == 0, 2.0)
    with pytest.raises(httpx.ReadTimeout):
        http.post(COMPLETIONS, json=body | {"n": 2}, timeout=0.2)
    wait_for(lambda: num_sessions(ring) == 0, 2.0)


def test_a_stop_string_frees_every_stage(ring: RingProcesses, http: httpx.Client) -> None:
    text = complete(http, "def f(x):")["choices"][0]["text"]
    stop = text[3:5]
    answer = complete(http, "def f(x):", stop=[stop], max_tokens=400)
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    wait_for(lambda: num_sessions(ring) == 0, 2.0)


def test_what_dies_ends_in_an_error_and_comes_back(tmp_path: Path) -> None:
    with serving_ring(tmp_path) as ring, httpx.Client(base_url=url(ring), timeout=60.0) as http:
        stream = Stream(url(ring), max_tokens=400)
        assert stream.began.wait(10.0)
        ring.kill(1)
        killed_at = time.monotonic()
        error = stream.error()
        assert is_in_time(stream.ended_at - killed_at, 2.0)
        assert "rank 1" in error["message"]
        assert http.get("/health").json()["status"] == "degraded", "who was told of the error is not told ok"
        wait_for(lambda: http.get("/health").json()["nodes"][1]["state"] == "unreachable", 2.0)
        assert http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 503
        ring.start(1)
        wait_for(lambda: is_healthy(http), 30.0)
        (process,) = psutil.Process(ring.processes[0].pid).children(recursive=True)
        process.kill()  # the HTTP process
        process.wait(5.0)
        wait_for(lambda: is_healthy(http), 30.0)
        choice = complete(http, PROMPTS[0], return_token_ids=True)["choices"][0]
        assert choice["token_ids"] == expected(ring, PROMPTS[0])
