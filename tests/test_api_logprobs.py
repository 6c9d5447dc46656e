"""Token ids and log-probabilities in answers and streams."""

from __future__ import annotations

from itertools import chain

import pytest

from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.tiny_models import BOS_ID, EOS_ID


def test_token_ids_in_a_chat(served: Served) -> None:
    answer = served.chat(max_tokens=3, return_token_ids=True)
    assert answer["prompt_token_ids"] == [BOS_ID, 259, *b"hi", 260]
    assert answer["choices"][0]["token_ids"] == [*b"Hel"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_in_a_stream(served: Served, path: str) -> None:
    served.ring.text = "é€!".encode()
    body = chat_body() if path == CHAT else {"prompt": [5, 6]}
    first, *rest, done = served.events(path, body | {"return_token_ids": True})
    assert done == "[DONE]"
    prompt = first["prompt_token_ids"] if path == CHAT else first["choices"][0]["prompt_token_ids"]
    assert prompt == ([BOS_ID, 259, *b"hi", 260] if path == CHAT else [5, 6])
    tokens = [event["choices"][0].get("token_ids", []) for event in rest]
    assert [ids for ids in tokens if ids] == [[token] for token in (*"é€!".encode(), EOS_ID)]  # at once
    assert list(chain(*tokens)) == [*"é€!".encode(), EOS_ID]


def test_chat_logprobs(served: Served) -> None:
    served.ring.text = "é".encode()
    served.ring.logprobs = {0xC3: float("-inf"), 0xA9: -0.25}
    answer = served.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9], [*b"<|eos|>"]]
    assert [entry.logprob for entry in logprobs.content] == [-9999.0, -0.25, -0.5]
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [1, 1, 1]
    assert logprobs.content[1].top_logprobs[0].logprob == -0.25


def test_chat_logprobs_without_top(served: Served) -> None:
    entries = served.chat(logprobs=True, max_tokens=2)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["H", "e"]
    assert [entry["top_logprobs"] for entry in entries] == [[], []]


def test_completion_logprobs(served: Served) -> None:
    served.ring.text = "aé!".encode()
    choice = served.complete(logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    assert logprobs["tokens"] == ["a", "\ufffd", "\ufffd", "!", "<|eos|>"]
    assert logprobs["token_logprobs"] == [-0.5] * 5
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "z": -2.0}
    assert choice["text"][logprobs["text_offset"][3] :] == "!"
    zero = served.complete(logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    assert zero["top_logprobs"] == [{"a": -0.5}]


def test_streamed_logprobs_are_complete(served: Served) -> None:
    served.ring.text = "aé!".encode()
    *events, _ = served.events(COMPLETIONS, {"prompt": "x", "logprobs": 1, "stop": ["é?"]})
    parts = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    assert list(chain(*(part["tokens"] for part in parts))) == ["a", "\ufffd", "\ufffd", "!", "<|eos|>"]
    assert list(chain(*(part["text_offset"] for part in parts))) == [0, 1, 1, 2, 3]
