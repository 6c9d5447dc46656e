"""Token ids and log-probabilities in answers and streams."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.tiny_models import BOS_ID, EOS_ID

INCLUDED: Any = {"include": ["message.output_text.logprobs"]}


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


# -- Responses ----------------------------------------------------------------------------------------


def test_a_response_with_logprobs(served: Served) -> None:
    served.ring.text = "é!".encode()
    served.ring.logprobs = {0xC3: float("-inf"), 0xA9: -0.25}
    told = served.openai.responses.create(model="tiny", input="hi", top_logprobs=2, **INCLUDED)
    assert told.top_logprobs == 2
    (item,) = told.output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert part.text == "é!"
    entries = part.logprobs
    assert entries is not None
    assert [entry.bytes for entry in entries] == [[0xC3], [0xA9], [*b"!"]]  # the text's, without its end
    assert [entry.token for entry in entries] == ["\ufffd", "\ufffd", "!"]
    assert [entry.logprob for entry in entries] == [-9999.0, -0.25, -0.5]
    assert [(top.token, top.bytes, top.logprob) for top in entries[2].top_logprobs] == [
        ("!", [*b"!"], -0.5),
        ("z", [*b"z"], -2.0),
    ]


def test_a_streamed_response_with_logprobs(served: Served) -> None:
    served.ring.text = "Één, twee".encode()
    fields: Any = {"model": "tiny", "input": "hi", "top_logprobs": 1, **INCLUDED}
    whole = served.openai.responses.create(**fields)
    with served.openai.responses.stream(**fields) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    said: Any = whole.output[0]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    told = [entry for event in deltas for entry in event.logprobs]
    assert len(deltas) > 3
    assert [entry.model_dump() for entry in told] == [entry.model_dump() for entry in done.logprobs]
    assert [(entry.token, entry.logprob) for entry in told] == [
        (entry.token, entry.logprob) for entry in said.content[0].logprobs
    ]
    assert all(len(entry.top_logprobs or []) == 1 for entry in told)
    last: Any = streamed.output[0]
    assert last.content[0].logprobs == said.content[0].logprobs


def test_logprobs_of_a_response_are_given_to_who_includes_them(served: Served) -> None:
    def logprobs(**fields: Any) -> Any:
        told: Any = served.openai.responses.create(model="tiny", input="hi", max_output_tokens=2, **fields)
        return told.output[0].content[0].logprobs

    assert logprobs(top_logprobs=3) == []
    assert not served.ring.last.sampling.logprobs
    assert [entry.top_logprobs for entry in logprobs(**INCLUDED)] == [[], []]
    error = served.error({"input": "hi", "top_logprobs": 21, **INCLUDED}, path="/v1/responses")
    assert (error["param"], error["code"]) == ("top_logprobs", "invalid_value")
