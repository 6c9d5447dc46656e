"""What the answers of a chat must keep to: with reasoning, with tools, and in gpt-oss's messages."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.api.chat_grammar import chat_grammar
from cluster.api.errors import ApiError
from cluster.api.harmony import TOKENS as HARMONY_TOKENS
from cluster.api.schema import ChatBody
from cluster.api.syntax import ModelSyntax
from cluster.api.tools import read_tools
from cluster.grammar import check_grammar
from cluster.guide import Guides
from cluster.tokenizer import Tokenizer, load_tokenizer
from tests.api_server import write_model
from tests.tiny_models import EOS_ID
from tests.tool_models import FIRST_ID, QWEN3, QWEN3_TOKENS, write_tokens

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("now", "here")
]
JSON = {"type": "json_object"}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
COMMENTARY = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"


@dataclass(frozen=True, slots=True)
class Model:
    """A tokenizer with what is made of it, for the two sides."""

    tokens: Sequence[str]
    tokenizer: Tokenizer
    syntax: ModelSyntax
    guides: Guides

    @classmethod
    def write(cls, folder: Path, tokens: Sequence[str], template: str = QWEN3) -> Model:
        write_model(folder)
        write_tokens(folder, tokens, template, are_special=tokens is HARMONY_TOKENS)
        tokenizer = load_tokenizer(folder)
        guides = Guides(folder, FIRST_ID + len(tokens))
        guides.open('{"grammars": [{"json_schema": {}}]}').allowed([])  # no test leaves its thread behind
        return cls(tokens, tokenizer, ModelSyntax(tokenizer), guides)

    def ids(self, text: str) -> list[int]:
        """Bytes, and the markers as tokens of their own."""
        for i, marker in enumerate(self.tokens):
            text = text.replace(marker, chr(0xE000 + i))
        found: list[int] = []
        for char in text:
            found += [FIRST_ID + ord(char) - 0xE000] if 0xE000 <= ord(char) < 0xE010 else char.encode()
        return found

    def grammar(self, prompt: str = "hi", begun: str | None = None, **fields: Any) -> tuple[str, str]:
        body = ChatBody(**fields)
        use = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
        found = chat_grammar(body, use, self.syntax, prompt=self.ids(prompt), begun=begun)
        if found[0]:
            check_grammar(found[0])
        return found

    def takes(self, answer: str, prompt: str = "hi", begun: str | None = None, **fields: Any) -> bool:
        """Whether this may be the whole answer."""
        allowed = self.guides.open(self.grammar(prompt, begun, **fields)[0]).allowed(self.ids(answer))
        return allowed is not None and bool(allowed[EOS_ID])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    yield Model.write(tmp_path_factory.mktemp("models") / "qwen", QWEN3_TOKENS)
    gc.collect()


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    yield Model.write(tmp_path_factory.mktemp("models") / "harmony", HARMONY_TOKENS)
    gc.collect()


def test_without_a_wish_there_is_no_grammar(qwen: Model) -> None:
    assert qwen.grammar(tools=TOOLS, response_format={"type": "text"}) == ("", "")
    assert qwen.grammar(tools=TOOLS, tool_choice="none", response_format=JSON)[1] == "response_format"


def test_reasoning_may_come_before_the_answer(qwen: Model) -> None:
    assert qwen.takes('{"a": 1}', response_format=JSON)
    assert qwen.takes('<think>\nWell {\n</think>\n\n{"a": 1}', response_format=JSON)
    assert not qwen.takes("<think>\nWell\n</think>\n\nNo.", response_format=JSON)
    is_open = {"prompt": "hi<think>\n", "response_format": JSON}
    assert qwen.takes('Well\n</think>\n\n{"a": 1}', **is_open)
    assert not qwen.takes('{"a": 1}', **is_open)
    is_off = {"prompt": "hi<think>\n\n</think>\n\n", "response_format": JSON}
    assert qwen.takes('{"a": 1}', **is_off)
    assert not qwen.takes('<think></think>{"a": 1}', **is_off)
    assert not qwen.takes('<think></think>{"a": 1}', begun="So: ", response_format=JSON)


def test_a_call_that_must_be(qwen: Model) -> None:
    required = {"tools": TOOLS, "tool_choice": "required"}
    assert qwen.grammar(**required)[1] == "tool_choice"
    assert qwen.takes(CALL, **required)
    assert qwen.takes(f"<think>\nhm\n</think>\n\n{CALL}\n{CALL.replace('now', 'here')}", **required)
    assert not qwen.takes("It is late.", **required)
    assert not qwen.takes(f"{CALL}\n{CALL}", parallel_tool_calls=False, **required)
    named: dict[str, Any] = {"type": "function", "function": {"name": "here"}}
    assert not qwen.takes(CALL, tools=TOOLS, tool_choice=named)
    assert qwen.takes(CALL.replace("now", "here"), tools=TOOLS, tool_choice=named)


def test_an_answer_of_a_fixed_form_or_a_call(qwen: Model, harmony: Model) -> None:
    both = {"tools": TOOLS, "response_format": JSON}
    assert qwen.takes('{"a": 1}', **both)
    assert qwen.takes(CALL, **both)
    assert qwen.takes(f"<think>\nhm\n</think>\n\n{CALL}", **both)
    assert not qwen.takes("It is late.", **both)
    assert harmony.takes('<|channel|>final<|message|>{"a": 1}', **both)
    assert harmony.takes(COMMENTARY, **both)


def test_gpt_oss_has_a_message_for_each(harmony: Model) -> None:
    analysis = "<|channel|>analysis<|message|>hm {<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"a": 1}'
    assert harmony.takes(final, response_format=JSON)
    assert harmony.takes(analysis + final, response_format=JSON)
    assert not harmony.takes('{"a": 1}', response_format=JSON)
    assert not harmony.takes(analysis, response_format=JSON)
    assert harmony.takes('{"a": 1}', begun="So: ", response_format=JSON)
    assert harmony.takes(analysis + COMMENTARY, tools=TOOLS, tool_choice="required")
    assert not harmony.takes(analysis + final, tools=TOOLS, tool_choice="required")


def test_contradictions_are_refused(qwen: Model) -> None:
    with pytest.raises(ApiError, match="response_format and a tool_choice that asks for a call exclude each"):
        qwen.grammar(tools=TOOLS, tool_choice="required", response_format=JSON)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ tools }}<|tool_call><tool_call|>",
            r"tool_choice cannot be followed: calls in .* \(gemma4\) cannot",
        ),
        ("{{ tools }}", r"tool_choice cannot be followed: calls in this model's notation \(none\) cannot be"),
    ],
)
def test_a_notation_that_cannot_be_forced_is_refused(tmp_path: Path, template: str, message: str) -> None:
    folder = write_model(tmp_path / "other")
    write_tokens(folder, (), template)
    syntax = ModelSyntax(load_tokenizer(folder))
    body = ChatBody(tools=TOOLS, tool_choice="required")
    with pytest.raises(ApiError, match=message):
        chat_grammar(body, read_tools(TOOLS, "required", None), syntax, prompt=[1], begun=None)


def test_headers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syntax = ModelSyntax(load_tokenizer(write_model(tmp_path / "muse")))
    monkeypatch.setattr(ModelSyntax, "has_headers", True)
    with pytest.raises(ApiError, match="response_format cannot be followed: the messages of this model's"):
        chat_grammar(
            ChatBody(response_format=JSON), read_tools(None, None, None), syntax, prompt=[1], begun=None
        )
