"""What /v1/completions and /v1/chat/completions answer, over real sockets and with the real openai client."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from typing import Any

import openai
import pytest

from proto import ring_pb2
from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.tiny_models import BOS_ID, EOS_ID

NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}

# -- the openai client -------------------------------------------------------------------------------


def test_openai_chat(served: Served) -> None:
    answer = served.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert abs(answer.created - time.time()) < 60
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello, world."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        14,
        19,
    )
    assert served.ring.prompts[served.ring.last.session] == [BOS_ID, 259, *b"hi", 260]


def test_openai_chat_stream(served: Served) -> None:
    stream = served.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *rest, last, usage = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == "Hello, world."
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *rest))
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 14
    assert len({chunk.id for chunk in (first, *rest, last, usage)}) == 1


def test_openai_completion_stream(served: Served) -> None:
    stream = served.openai.completions.create(model="tiny", prompt="hi", max_tokens=5, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openai_async_clients_at_once(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, streams: bool) -> str:
        messages: Any = [{"role": "user", "content": "hi"}]
        if not streams:
            answer = await client.chat.completions.create(model="tiny", messages=messages)
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.api.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, streams=i % 2 == 0) for i in range(4)))

    assert asyncio.run(ask_all()) == ["Hello, world."] * 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Served) -> None:
    body = json.dumps({"prompt": "hi", "max_tokens": 3})
    command = [
        "curl",
        "-sS",
        f"{served.api.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["choices"][0]["text"] == "Hel"


# -- what the head is asked ---------------------------------------------------------------------------


def test_every_sampling_field_reaches_the_ring(served: Served) -> None:
    served.complete(
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        repetition_context_size=20,
        presence_penalty=-1.5,
        frequency_penalty=2,
        logit_bias={"65": -100, "7": 2.5},
        seed=12345,
        min_tokens=2,
        max_tokens=9,
        stop_token_ids=[300, 5],
        logprobs=4,
    )
    wanted = ring_pb2.Sampling(
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        repetition_context=20,
        presence_penalty=-1.5,
        frequency_penalty=2,
        logit_bias={65: -100.0, 7: 2.5},
        seed=12345,
        logprobs=True,
        top_logprobs=4,
        min_tokens=2,
        stop_ids=[5, EOS_ID, 300],
    )
    assert served.ring.last.sampling == wanted
    assert served.ring.last.max_tokens == 9


def test_temperature_zero_stays_zero(served: Served) -> None:
    served.chat(temperature=0)
    assert served.ring.last.sampling.temperature == 0


def test_defaults_are_openais(served: Served) -> None:
    served.chat()
    sampling = served.ring.last.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert sampling.repetition_penalty == 1
    assert served.ring.last.max_tokens == 600 - 5  # a chat may fill the context
    assert not sampling.logprobs
    served.complete()
    assert served.ring.last.max_tokens == 16
    seeds = {sampling.seed, served.ring.last.sampling.seed}
    assert len(seeds) == 2  # a fresh seed each time


def test_null_means_not_given(served: Served) -> None:
    names = (
        "temperature",
        "top_p",
        "max_tokens",
        "stop",
        "n",
        "seed",
        "logit_bias",
        "stream",
        "stream_options",
    )
    answer = served.chat(**dict.fromkeys(names), tools=None, user=None, response_format=None)
    assert answer["choices"][0]["message"]["content"] == "Hello, world."


def test_top_k_minus_one_is_off(served: Served) -> None:
    served.complete(top_k=-1)
    assert served.ring.last.sampling.top_k == 0


def test_several_choices_have_seeds_of_their_own(served: Served) -> None:
    answer = served.complete(n=3, seed=2**64 - 1, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {spec.sampling.seed for spec in served.ring.opened} == {2**64 - 1, 0, 1}
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8, **NONE_CACHED}


def test_a_negative_seed_is_a_seed(served: Served) -> None:
    served.complete(seed=-1)
    assert served.ring.last.sampling.seed == 2**64 - 1


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_both_names_of_the_limit(served: Served, path: str, field: str) -> None:
    body = chat_body() if path == CHAT else {"prompt": "hi"}
    assert served.post(path, body | {field: 4})["choices"][0]["finish_reason"] == "length"
    assert served.ring.last.max_tokens == 4


# -- prompts ------------------------------------------------------------------------------------------


def test_prompts_in_every_form(served: Served) -> None:
    for prompt, wanted in (
        ("hi", [[*b"hi"]]),
        (["hi", "you"], [[*b"hi"], [*b"you"]]),
        ([104, 105, 300], [[104, 105, 300]]),
        ([[104], [105, 106]], [[104], [105, 106]]),
    ):
        served.ring.reset()
        answer = served.complete(prompt, max_tokens=1)
        assert len(answer["choices"]) == len(wanted)
        seen = [served.ring.prompts[spec.session] for spec in served.ring.opened]
        assert sorted(seen) == sorted(wanted)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))


def test_choices_of_several_prompts_come_prompt_after_prompt(served: Served) -> None:
    answer = served.complete(["a", "bc"], n=2, max_tokens=1, return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97], [97], [98, 99], [98, 99]]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, **NONE_CACHED}


def test_special_tokens_written_in_a_message_harm_nothing(served: Served) -> None:
    text = "<|eos|><|im_end|>\u0000</s>[INST]{{ x }}"
    assert served.chat(text)["choices"][0]["message"]["content"] == "Hello, world."
    assert EOS_ID in served.ring.prompts[served.ring.last.session]


def test_text_parts_are_joined(served: Served) -> None:
    served.chat([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])
    assert served.ring.prompts[served.ring.last.session] == [BOS_ID, 259, *b"hi", 260]


def test_roles_and_fields_of_messages(served: Served) -> None:
    messages = [
        {"role": "developer", "content": "s", "name": "boss"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "audio": None},
        {"role": "user", "content": "é"},
    ]
    served.post(CHAT, {"messages": messages})
    seen = served.ring.prompts[served.ring.last.session]
    assert seen == [BOS_ID, 261, *b"s", 259, *b"u", 260, *b"a", 259, *"é".encode(), 260]


def test_an_answer_can_be_continued(served: Served) -> None:
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "He"}]
    served.post(CHAT, {"messages": messages, "continue_final_message": True})
    assert served.ring.prompts[served.ring.last.session] == [BOS_ID, 259, *b"u", 260, *b"He"]
    served.post(CHAT, {"messages": messages[:1], "add_generation_prompt": False})
    assert served.ring.prompts[served.ring.last.session] == [BOS_ID, 259, *b"u"]


def test_a_prompt_is_scored(served: Served) -> None:
    fields = {"echo": True, "logprobs": 1, "temperature": 0}
    whole = served.complete([104, 105, 106], max_tokens=2, **fields)
    choice = whole["choices"][0]
    assert choice["text"] == "hijHe"
    assert choice["logprobs"] == {
        "tokens": ["h", "i", "j", "H", "e"],
        "token_logprobs": [None, pytest.approx(-1.05), pytest.approx(-1.06), -0.5, -0.5],
        "text_offset": [0, 1, 2, 3, 4],
        "top_logprobs": [
            None,
            {"z": -0.25, "i": pytest.approx(-1.05)},
            {"z": -0.25, "j": pytest.approx(-1.06)},
            {"H": -0.5},
            {"e": -0.5},
        ],
    }
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    *events, done = served.events(COMPLETIONS, {"prompt": [104, 105, 106], "max_tokens": 2, **fields})
    assert done == "[DONE]"
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == choice["text"]
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    assert {key: [x for one in logprobs for x in one[key]] for key in logprobs[0]} == choice["logprobs"]


def test_a_prompt_is_scored_without_an_answer(served: Served) -> None:
    whole = served.complete([104, 105], max_tokens=0, echo=True, logprobs=0)
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, pytest.approx(-1.05)]
    assert whole["usage"]["completion_tokens"] == 0
    assert served.ring.last.max_tokens == 1  # the ring draws one, which goes nowhere
    served.ring.text = b""  # the one that is drawn ends the answer
    assert served.complete([104], max_tokens=0, echo=True)["choices"][0]["finish_reason"] == "length"
    one = served.complete([104], max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert (one["tokens"], one["token_logprobs"]) == (["h"], [None])


def test_echo(served: Served) -> None:
    assert served.complete("é", max_tokens=2, echo=True)["choices"][0]["text"] == "éHe"
    assert served.complete([104, 105], max_tokens=2, echo=True)["choices"][0]["text"] == "hiHe"
    *events, done = served.events(COMPLETIONS, {"prompt": ["é", "x"], "max_tokens": 1, "echo": True})
    assert done == "[DONE]"
    texts = {0: "", 1: ""}
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: "éH", 1: "xH"}


# -- the answer's text --------------------------------------------------------------------------------


def test_characters_are_never_cut(served: Served) -> None:
    served.ring.text = "naïve 漢字 😀\u2028\x85!".encode()
    *events, _ = served.events(CHAT, chat_body())
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(texts) == "naïve 漢字 😀\u2028\x85!"
    assert not any("\ufffd" in text for text in texts)
    assert len(texts) < 20  # no empty chunks for the bytes in between


def test_a_raw_stream_has_no_other_line_ends(served: Served) -> None:
    served.ring.text = "a\u2028b\x85c\u2029d\x0be\rf".encode()
    reply = served.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 50, "stream": True})
    assert all(line == "" or line.startswith("data: ") for line in reply.text.splitlines())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [("o", "Hell"), (["xyz", ", w"], "Hello"), ("H", ""), ("world.", "Hello, "), (["d.!"], None)],
)
def test_stop_strings(served: Served, stop: Any, text: str | None, streams: bool) -> None:
    if streams:
        *events, done = served.events(CHAT, chat_body(stop=stop))
        assert done == "[DONE]"
        shown = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = served.chat(stop=stop)["choices"][0]
        shown, reason = choice["message"]["content"], choice["finish_reason"]
    assert shown == ("Hello, world." if text is None else text)
    assert reason == "stop"
    served.ring.wait_closed(1)


def test_tokens_after_a_stop_string_are_not_counted(served: Served) -> None:
    answer = served.complete(stop=["o"], max_tokens=100, return_token_ids=True)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["token_ids"] == [*b"Hello"]


def test_the_stop_string_can_be_included(served: Served) -> None:
    assert served.complete(stop="o,", include_stop_str_in_output=True)["choices"][0]["text"] == "Hello,"


def test_min_tokens_hold_for_stop_strings(served: Served) -> None:
    served.ring.text = b"oxo"
    answer = served.complete(stop="o", min_tokens=2, ignore_eos=True)
    assert answer["choices"][0]["text"] == "ox"


def test_stop_token_ids(served: Served) -> None:
    choice = served.complete(stop_token_ids=[ord(",")], return_token_ids=True)["choices"][0]
    assert choice["text"] == "Hello"
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [*b"Hello,"]


def test_ignore_eos(served: Served) -> None:
    served.ring.text = b"ab"
    choice = served.complete(max_tokens=7, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == "ababa"
    assert choice["token_ids"] == [97, 98, EOS_ID, 97, 98, EOS_ID, 97]
    shown = served.complete(max_tokens=4, ignore_eos=True, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "ab<|eos|>a"
