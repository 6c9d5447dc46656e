"""Answers of gpt-oss (github.com/openai/harmony, docs/format.md), cut anywhere."""

from __future__ import annotations

from typing import Any

from cluster.api.harmony import HarmonyReader
from cluster.api.parts import CallStart, Message, Part

THOUGHT = "<|channel|>analysis<|message|>User asks.<|end|>"
SAID = "<|start|>assistant<|channel|>final<|message|>Hello <b>.<|return|>"
PREAMBLE = "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Köln"}<|call|>'
)
OTHER_ORDER = '<|start|>assistant to=functions.now<|channel|>commentary<|message|>{"a": "<x"}'


def read(text: str, *, is_cut: bool = False, size: int = 0, **fields: Any) -> list[Part]:
    reader = HarmonyReader(**fields)
    parts: list[Part] = []
    for place in range(0, len(text), size or len(text)):
        parts += reader.feed(text[place : place + (size or len(text))])
    return parts + reader.finish(is_cut=is_cut)


def test_reasoning_and_answer() -> None:
    for size in (0, 1, 5):
        assert Message.of(read(THOUGHT + SAID, size=size)) == Message("Hello <b>.", "User asks.")
    assert Message.of(read("lo <b>.", is_continued=True)) == Message("lo <b>.")


def test_calls() -> None:
    for size in (0, 1, 5):
        said = Message.of(read(THOUGHT + PREAMBLE + CALL + OTHER_ORDER, size=size, has_tools=True))
        assert (said.reasoning, said.content) == ("User asks.", "I look.")
        assert [(call.name, call.arguments) for call in said.calls] == [
            ("get_weather", '{"city": "Köln"}'),
            ("now", '{"a": "<x"}'),
        ]
        assert all(call.is_complete for call in said.calls)


def test_the_end_is_missing() -> None:
    (call,) = Message.of(read(THOUGHT + CALL[:-10], has_tools=True, is_cut=True)).calls
    assert (call.arguments, call.is_complete) == ('{"city": "Köln', False)
    assert Message.of(read(THOUGHT + "<|start|>assistant<|chan")) == Message("", "User asks.")


def test_one_call_only() -> None:
    parts = read(CALL + OTHER_ORDER, has_tools=True, max_calls=1)
    assert [part.name for part in parts if isinstance(part, CallStart)] == ["get_weather"]


def test_what_goes_to_other_tools() -> None:
    text = "<|channel|>commentary to=python<|message|>1 + 1<|call|>"
    assert Message.of(read(text)) == Message("", "1 + 1")
    assert Message.of(read(CALL)).calls == []  # nobody offered it
