"""Refused fields, values and prompts: the field's name and a sentence, and the ring is never asked."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from cluster.api import schema
from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.scripted_ring import CONTEXT
from tests.waiting import is_in_time

# -- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature: the value should be greater than or equal to 0."),
        ("temperature", float("nan"), "temperature: the value should be a finite number."),
        ("temperature", float("inf"), "temperature: the value should be a finite number."),
        ("temperature", 1e39, "temperature: the value should be less than or equal to 100."),
        ("temperature", "1", "temperature: the value should be a valid number."),
        ("temperature", True, "temperature: the value should be a valid number."),
        ("temperature", [1], "temperature: the value should be a valid number."),
        ("top_p", 0, "top_p: the value should be greater than 0."),
        ("top_p", 1.01, "top_p: the value should be less than or equal to 1."),
        ("top_k", -2, "top_k: the value should be greater than or equal to -1."),
        ("top_k", 1.5, "top_k: the value should be a valid integer."),
        ("min_p", -0.1, "min_p: the value should be greater than or equal to 0."),
        ("repetition_penalty", 0, "repetition_penalty: the value should be greater than 0."),
        ("presence_penalty", 2.1, "presence_penalty: the value should be less than or equal to 2."),
        ("frequency_penalty", -2.1, "frequency_penalty: the value should be greater than or equal to -2."),
        ("max_tokens", "16", "max_tokens: the value should be a valid integer."),
        ("max_tokens", 16.0, "max_tokens: the value should be a valid integer."),
        ("max_tokens", True, "max_tokens: the value should be a valid integer."),
        (
            "max_completion_tokens",
            0,
            "max_completion_tokens: the value should be greater than or equal to 1.",
        ),
        ("min_tokens", -1, "min_tokens: the value should be greater than or equal to 0."),
        ("min_tokens", 20, "min_tokens is 20, but the answer has at most 4 tokens."),
        ("min_tokens", 2**40, "min_tokens: the value should be less than 2147483648."),
        ("n", 7, "n is 7, but this ring runs 4 at once and queues 2: n can be 6 at most."),
        ("n", 64, "n is 64, but this ring runs 4 at once and queues 2: n can be 6 at most."),
        ("n", 0, "n: the value should be greater than or equal to 1."),
        ("n", 65, "n: the value should be less than or equal to 64."),
        ("seed", 1.5, "seed: the value should be a valid integer."),
        ("seed", 2**64, "seed: the value should be less than 18446744073709551616."),
        ("priority", "high", "priority: the value should be a valid integer."),
        ("priority", 2**31, "priority: the value should be less than 2147483648."),
        ("stream", "yes", "stream: the value should be a valid boolean."),
        ("stream", 1, "stream: the value should be a valid boolean."),
        ("stop", 5, "stop must be a string or a list of strings."),
        ("stop", ["a", 5], "stop must be a string or a list of strings."),
        ("stop", "", "stop holds an empty string."),
        ("stop", ["a", ""], "stop holds an empty string."),
        ("stop", list("abcde"), "stop holds 5 strings; 4 are allowed."),
        ("stop", "x" * 1025, "stop holds a string of more than 1024 characters."),
        ("stop_token_ids", [320], "stop_token_ids: the token id 320 is not in the vocabulary (0 to 319)."),
        ("stop_token_ids", [-1], "stop_token_ids: the token id -1 is not in the vocabulary (0 to 319)."),
        ("logit_bias", {"320": 1}, "logit_bias: the token id 320 is not in the vocabulary (0 to 319)."),
        ("logit_bias", {"a": 1}, 'logit_bias: "a" is not a token id.'),
        ("logit_bias", {"-1": 1}, 'logit_bias: "-1" is not a token id.'),
        ("logit_bias", [1], "logit_bias: the value should be a valid dictionary."),
        ("model", 5, "model: the value should be a valid string."),
        ("return_token_ids", "no", "return_token_ids: the value should be a valid boolean."),
        ("stream_options", {"include_usage": True}, "stream_options is only allowed when stream is true."),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_wrong_values(refusing: Served, path: str, field: str, value: Any, message: str) -> None:
    body: dict[str, Any] = chat_body() if path == CHAT else {"prompt": "hi"}
    error = refusing.error({"max_tokens": 4, **body, field: value}, path=path)
    assert error["message"] == message
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"logprobs": 5}, "logprobs", "logprobs: the value should be a valid boolean."),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true."),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "logprobs: the value should be a valid integer."),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        (CHAT, {"max_tokens": -5}, "max_tokens", "the value should be greater than or equal to 1."),
        (CHAT, {"max_tokens": 0}, "max_tokens", "the value should be greater than or equal to 1."),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "0 is only allowed together with echo."),
        (COMPLETIONS, {"best_of": 2}, "best_of", "best_of is only supported when it equals n."),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ; send one of them."),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        (CHAT, {"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "is not a field"),
        (CHAT, {"stop_token_ids": [1, "a"]}, "stop_token_ids[1]", "should be a valid integer"),
        (
            CHAT,
            {"chat_template_kwargs": {"tokenize": False}},
            "messages",
            "kwargs: tokenize is not supported.",
        ),
        (
            CHAT,
            {"chat_template_kwargs": {"chat_template": "x"}},
            "messages",
            "chat_template is not supported.",
        ),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "messages", "refuses these messages"),
        (
            CHAT,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude each other",
        ),
    ],
)
def test_wrong_combinations(
    refusing: Served, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refusing.error((chat_body() if path == CHAT else {"prompt": "hi"}) | fields, path=path)
    assert message in error["message"]
    assert error["param"] == param


# -- fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("suffix", "end"),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("guided_grammar", 'root ::= "a"'),
        ("prompt_logprobs", 1),
        ("truncate_prompt_tokens", 10),
        ("bad_words", ["x"]),
        ("adapters", "x"),
        ("xtc_probability", 0.5),
    ],
)
def test_unsupported_fields_are_named(refusing: Served, field: str, value: Any) -> None:
    error = refusing.error(chat_body(**{field: value}), path=CHAT)
    assert error["message"].startswith(f"{field} is not supported with the value {json.dumps(value)}")
    assert error["message"].endswith(".")
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"


def test_unknown_fields_are_named(refusing: Served) -> None:
    error = refusing.error(chat_body(max_token=5), path=CHAT)
    assert error["message"] == "max_token is not a field of this request. Did you mean max_tokens?"
    assert (error["param"], error["code"]) == ("max_token", "unknown_parameter")
    assert refusing.error(chat_body(zzz=None), path=CHAT)["param"] == "zzz"
    assert refusing.error({"prompt": "x", "messages": []})["param"] == "messages"
    assert refusing.error(chat_body(prompt="x"), path=CHAT)["param"] == "prompt"
    assert refusing.error(chat_body(echo=True), path=CHAT)["param"] == "echo"


def test_what_cannot_change_a_token_is_accepted(served: Served) -> None:
    neutral = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "prompt_cache_options": {"ttl": "30m"},
        "cache_control": {"type": "ephemeral"},
        "moderation": {"model": "omni"},
        "parallel_tool_calls": True,
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "use_beam_search": False,
        "length_penalty": 1,
        "stop": [],
        "stream_options": None,
    }
    assert served.post(CHAT, chat_body(**neutral))["choices"][0]["message"]["content"] == "Hello, world."
    of_completions = {"suffix": None, "echo": False, "best_of": 1, "user": "me", "logprobs": None}
    assert (
        served.post(COMPLETIONS, {"prompt": "hi", **of_completions})["choices"][0]["text"] == "Hello, world."
    )
    assert served.post(COMPLETIONS, {"prompt": "hi", "n": 2, "best_of": 2})["choices"][1]["text"]


def test_every_neutral_field_is_either_neutral_or_supported() -> None:
    elsewhere = set(schema._NEUTRAL) | set(schema._IGNORED)
    assert not elsewhere & set(schema.CompletionBody.model_fields)
    of_chats = {*schema.ChatBody.model_fields} - {*schema.GenerateBody.model_fields}
    assert elsewhere & of_chats == {  # /v1/completions takes them where they mean "off"
        *("tools", "tool_choice", "parallel_tool_calls", "documents", "reasoning_effort", "include_reasoning")
    }


# -- prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty."),
        ([], "prompt is empty."),
        ([""], "prompt is empty."),
        ([[]], "prompt is empty."),
        (["a", ""], "prompt is empty."),
        (None, "prompt is missing."),
        (5, "prompt must be a text, a list of texts, or token ids."),
        ({"a": 1}, "prompt must be a text, a list of texts, or token ids."),
        ([None], "prompt must be a text, a list of texts, or token ids."),
        ([True], "prompt must be a text, a list of texts, or token ids."),
        ([1, "a"], "prompt: element 1 is not a token id (a whole number)."),
        ([1, 1.5], "prompt: element 1 is not a token id (a whole number)."),
        ([1, True], "prompt: element 1 is not a token id (a whole number)."),
        ([[1], [None]], "prompt: element 0 is not a token id (a whole number)."),
        ([320], "prompt: the token id 320 is not in the vocabulary (0 to 319)."),
        ([-1], "prompt: the token id -1 is not in the vocabulary (0 to 319)."),
        ([10**30], f"prompt: the token id {10**30} is not in the vocabulary (0 to 319)."),
        (["a"] * 65, "prompt: 65 prompts with n = 1 make more than 64 answers; send several requests."),
    ],
)
def test_wrong_prompts(refusing: Served, prompt: Any, message: str) -> None:
    error = refusing.error({"prompt": prompt})
    assert error["message"] == message
    assert error["param"] == "prompt"


def test_lone_surrogates_are_no_text(refusing: Served) -> None:
    for body in (
        b'{"prompt": "ab\\ud800"}',
        b'{"prompt": "ab\\uD800"}',
        b'{"prompt": "x", "stop": "\\ud800"}',
        b'{"prompt": "x", "model": "\\udfff"}',
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "\xed\xa0\x80"}',
    ):
        error = refusing.error(body)
        assert error["code"] == "invalid_json"
        assert "codec can't" in error["message"]


@pytest.mark.parametrize(
    ("num_prompts", "n", "param", "message"),
    [
        (
            2,
            4,
            "n",
            "2 prompts with n = 4 make 8 answers, but this ring runs 4 at once and queues 2: "
            "n can be 3 at most.",
        ),
        (
            6,
            2,
            "n",
            "6 prompts with n = 2 make 12 answers, but this ring runs 4 at once and queues 2: "
            "n can be 1 at most.",
        ),
        (
            7,
            1,
            "prompt",
            "prompt: 7 prompts with n = 1 make 7 answers, but this ring runs 4 at once and "
            "queues 2; send several requests.",
        ),
        (
            8,
            2,
            "prompt",
            "prompt: 8 prompts with n = 2 make 16 answers, but this ring runs 4 at once and "
            "queues 2; send several requests.",
        ),
    ],
)
def test_more_answers_than_can_ever_run(
    refusing: Served, num_prompts: int, n: int, param: str, message: str
) -> None:
    error = refusing.error({"prompt": ["a"] * num_prompts, "n": n})
    assert (error["message"], error["param"], error["code"]) == (message, param, "invalid_value")


def test_as_many_answers_as_run_and_queue_are_served(served: Served) -> None:
    assert len(served.chat(n=6)["choices"]) == 6
    assert len(served.complete(["a", "b"], n=3)["choices"]) == 6


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (None, "messages", "messages is missing."),
        ([], "messages", "messages is empty."),
        ("hi", "messages", "messages must be a list."),
        (["hi"], "messages[0]", "messages[0] must be an object with role and content."),
        ([{"content": "x"}], "messages[0].role", "must be one of system, developer, user, assistant, tool."),
        ([{"role": "wizard", "content": "x"}], "messages[0].role", "must be one of system"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "must be one of system"),
        ([{"role": "tool"}], "messages[0].content", "must be a text or a list of text parts."),
        (
            [{"role": "user", "content": "x", "tool_call_id": "1"}],
            "messages[0].tool_call_id",
            "not supported.",
        ),
        ([{"role": "user"}], "messages[0].content", "must be a text or a list of text parts."),
        ([{"role": "user", "content": 5}], "messages[0].content", "must be a text or a list of text parts."),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
            "a part of type 'image_url' is not supported; only text parts are.",
        ),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "a part is not supported"),
        ([{"role": "user", "content": "x", "mood": "bad"}], "messages[0].mood", "is not supported."),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls[0]",
            "must be a call of a function: {id, type, function: {name, arguments}}.",
        ),
    ],
)
def test_wrong_messages(refusing: Served, messages: Any, param: str, message: str) -> None:
    error = refusing.error({"messages": messages}, path=CHAT)
    assert message in error["message"]
    assert error["param"] == param


def test_beyond_the_context(refusing: Served) -> None:
    error = refusing.error({"prompt": "abc", "max_tokens": CONTEXT - 2})
    assert error["message"] == (
        "This model's maximum context length is 600 tokens. However, you requested 601 tokens "
        "(3 in the prompt, 598 in the completion). "
        "Please reduce the length of the prompt or of the completion."
    )
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = refusing.error({"prompt": "a" * CONTEXT})
    assert error["message"] == (
        "This model's maximum context length is 600 tokens. However, there are 600 tokens in your prompt. "
        "Please shorten the prompt to less than 600 tokens."
    )
    error = refusing.error({"messages": [{"role": "user", "content": "a" * CONTEXT}]}, path=CHAT)
    assert "there are 603 tokens in your messages" in error["message"]
    assert refusing.error(chat_body(max_tokens=2**40), path=CHAT)["code"] == "context_length_exceeded"


def test_the_whole_context_can_be_used(served: Served) -> None:
    answer = served.complete("a" * (CONTEXT - 3), max_tokens=3)
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert served.complete("a" * (CONTEXT - 1))["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ([5] * 100_000, "100000 tokens"),
        ("word " * 20_000, "100000 tokens"),
        ("x" * 1_000_000, "1000000 tokens"),
        ("x" * 10_000_000, f"at least {10_000_000 // len('<|assistant|>')} tokens"),
    ],
)
def test_huge_prompts_are_refused_quickly_and_with_numbers(
    refusing: Served, prompt: Any, numbers: str
) -> None:
    began = time.monotonic()
    error = refusing.error({"prompt": prompt})
    assert is_in_time(time.monotonic() - began, 5)
    assert error["code"] == "context_length_exceeded"
    assert "600 tokens" in error["message"]
    assert f"there are {numbers} in your prompt" in error["message"]
