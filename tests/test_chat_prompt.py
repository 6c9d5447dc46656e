"""Chats with tools as different templates want them, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.api.chat_prompt import read_chat
from cluster.api.errors import ApiError
from cluster.api.parts import CallStart
from cluster.api.prompt import Limits, Prompt
from cluster.api.schema import ChatBody
from cluster.api.syntax import ModelSyntax
from cluster.tokenizer import load_tokenizer
from tests.api_server import write_model
from tests.tool_models import write_tokens

LIMITS = Limits(context=4000, vocab_size=320)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "8"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


def read(folder: Path, template: str, **fields: Any) -> tuple[str, Prompt]:
    """The prompt, also as text."""
    write_tokens(folder, (), template)
    tokenizer = load_tokenizer(folder)
    prompt = read_chat(ChatBody(**fields), tokenizer, ModelSyntax(tokenizer), LIMITS)
    return tokenizer.decode(prompt.tokens), prompt


def test_arguments_are_objects_or_text_as_the_template_can_read_them(folder: Path) -> None:
    calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    ends = "{% endfor %}{% endfor %}{{ tools | length }}"
    of_objects = calls + "{{ c.function.arguments.items() | list }}" + ends
    of_texts = calls + "{{ 'f' + c['function']['arguments'] }}" + ends
    assert read(folder, of_objects, messages=CALLED, tools=TOOLS)[0] == "[('a', 'é')]1"
    assert read(folder, of_texts, messages=CALLED, tools=TOOLS)[0] == 'f{"a": "é"}1'
    with pytest.raises(ApiError, match="chat template refuses these messages: no calls"):
        read(folder, calls + "{{ raise_exception('no calls') }}" + ends, messages=CALLED, tools=TOOLS)


def test_a_template_of_one_call_gets_one(folder: Path) -> None:
    template = (
        "{{ tools }}{{ 'only supports single tool-calls' }}"
        + '{"name": function name, "parameters": dictionary'
    )
    _, prompt = read(folder, template, messages=[USER], tools=TOOLS)
    assert prompt.make_reader is not None
    reader = prompt.make_reader()
    parts = reader.feed('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}')
    assert len([part for part in parts if isinstance(part, CallStart)]) == 1
    assert reader.is_over


def test_a_template_without_tools_and_without_a_system(folder: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    text, _ = read(folder, template, messages=CALLED, tools=TOOLS)
    assert text.startswith("<|user|># Tools\n")
    assert text.endswith(
        '</tool_call>\n\nhi<|assistant|><tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
        "<|user|><tool_response>\n8\n</tool_response>"
    )
    system = {"role": "system", "content": "x"}
    with pytest.raises(ApiError, match="no system"):
        read(folder, template, messages=[system, USER], tools=TOOLS)


def test_documents_and_efforts(folder: Path) -> None:
    template = "{% for d in documents %}{{ d.text }}{% endfor %}{{ reasoning_effort }}"
    documents = [{"title": "t", "text": "x"}]
    text, _ = read(folder, template, messages=[USER], documents=documents, reasoning_effort="low")
    assert text == "xlow"
    for field, value, message in (
        (
            "documents",
            documents,
            "documents: this model's chat template takes none; put them into a message.",
        ),
        ("reasoning_effort", "low", "reasoning_effort: this model's chat template takes none; leave it out."),
        ("tool_choice", "required", "tool_choice needs tools."),
    ):
        with pytest.raises(ApiError) as caught:
            read(folder, "{{ messages[0].content }}", messages=[USER], **{field: value})
        assert (caught.value.message, caught.value.param) == (message, field)
