"""The messages of a chat: what of them is read, what is passed over, and what is refused by its name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.api.chat_messages import read_messages
from cluster.api.errors import ApiError
from cluster.tokenizer import Tokenizer

TOKENIZER = cast(Tokenizer, SimpleNamespace(template_mentions=lambda word: False))


def read(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return read_messages(list(messages), TOKENIZER)


def test_parts_are_joined() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b", "annotations": [], "citations": [{"cited_text": "x"}], "mood": None},
        {"type": "text", "text": "c", "prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    assert read({"role": "user", "content": parts}) == [{"role": "user", "content": "abc"}]
    said = [{"type": "text", "text": "I can "}, {"type": "refusal", "refusal": "not."}]
    assert read({"role": "assistant", "content": said}) == [{"role": "assistant", "content": "I can not."}]


def test_marks_beside_a_text_are_passed_over() -> None:
    marked = {"role": "assistant", "content": "hi", "cache_control": {"type": "ephemeral"}}
    cited = {"annotations": [{"type": "url_citation"}], "refusal": None, "audio": None}
    assert read(marked | cited) == [{"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    ("message", "place", "words"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "mood": "bad"}]},
            "messages[0].content[0].mood",
            "messages[0].content[0].mood is not supported.",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 5}]},
            "messages[0].content[0].text",
            "messages[0].content[0].text must be a text.",
        ),
        (
            {"role": "user", "content": [{"type": "refusal", "refusal": "no"}]},
            "messages[0].content[0]",
            "messages[0].content[0]: a part of type 'refusal' is not supported; only text parts are.",
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            "messages[0].function_call",
            "messages[0].function_call is not supported.",
        ),
    ],
)
def test_refusals(message: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(message)
    assert (caught.value.message, caught.value.param) == (words, place)
