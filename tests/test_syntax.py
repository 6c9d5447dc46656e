"""What a model's tokenizer says about its answers: as mlx-lm finds it, and a little more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx_lm import tokenizer_utils

from cluster.api.harmony import TOKENS as HARMONY
from cluster.api.harmony import HarmonyReader
from cluster.api.message_reader import MessageReader
from cluster.api.parts import Message
from cluster.api.reasoning import XTML_TOKENS, find_think_markers, has_begun
from cluster.api.syntax import ModelSyntax
from cluster.api.tool_families import _IN_TEMPLATE, FAMILIES, find_family
from cluster.api.tools import ToolUse, read_tools
from cluster.tokenizer import Tokenizer, load_tokenizer
from tests.api_server import write_model
from tests.test_message_reader import ANSWERS, TOOLS
from tests.tiny_models import CHAT_TEMPLATE
from tests.tool_models import FIRST_ID, QWEN3, QWEN3_TOKENS, write_tokens

USE = read_tools(TOOLS, None, None)
Load = Callable[..., Tokenizer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The byte tokenizer with more tokens and another template."""

    def load(
        tokens: tuple[str, ...], template: str = CHAT_TEMPLATE, *, are_special: bool = True
    ) -> Tokenizer:
        model = write_model(tmp_path / str(len(list(tmp_path.iterdir()))))
        write_tokens(model, tokens, template, are_special=are_special)
        return load_tokenizer(model)

    return load


def encode(text: str, *, add_special_tokens: bool) -> list[int]:
    return [*text.encode()]


def test_families_are_found_where_mlx_lm_finds_them() -> None:
    templates = ["", "<tool_call>", "{% for tool in tools %}"]
    templates += ["".join(needles) for needles, name in _IN_TEMPLATE]
    own = {"deepseek", "deepseek_v32", "llama"}
    for template in templates:
        for vocab in ({}, dict.fromkeys(XTML_TOKENS, 0), {"<|tool_call_start|>": 0, "<|tool_call_end|>": 1}):
            hf = SimpleNamespace(chat_template=template, get_vocab=lambda vocab=vocab: vocab)
            found = find_family(None, template, vocab)
            name = found.name if found is not None else None
            if name not in own:
                assert name == tokenizer_utils._infer_tool_parser(hf), template
            else:
                assert tokenizer_utils._infer_tool_parser(hf) is None or vocab


def test_every_parser_of_mlx_lm_is_known() -> None:
    folder = Path(tokenizer_utils.__file__).parent / "tool_parsers"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules <= FAMILIES.keys()
    for name in modules:
        module = __import__(f"mlx_lm.tool_parsers.{name}", fromlist=["x"])
        assert (module.tool_call_start, module.tool_call_end) == (FAMILIES[name].start, FAMILIES[name].end)
    assert find_family("laguna", "<arg_key>", {}) is FAMILIES["laguna"]  # the model's files go first


def test_think_markers_are_found_as_mlx_lm_finds_them() -> None:
    for tokens in (
        *(("<think>", "</think>"), ("<longcat_think>", "</longcat_think>")),
        *(("<|think:start|>", "<|think:end|>"), ("<|channel>", "<channel|>"), XTML_TOKENS),
        *((), ("<think>",)),
    ):
        vocab = dict.fromkeys(tokens, 0)
        start, end, *_ = tokenizer_utils._infer_thinking(
            SimpleNamespace(get_vocab=lambda vocab=vocab: vocab, encode=encode)
        )
        found = find_think_markers(vocab)
        assert (start, end) == ((found.start, found.end) if found is not None else (None, None))
    assert find_think_markers({"[THINK]": 0, "[/THINK]": 1}) is not None


def test_where_reasoning_has_begun() -> None:
    think = find_think_markers({"<think>", "</think>"})
    assert think is not None
    assert has_begun(think, "<|im_start|>assistant\n<think>\n")
    assert not has_begun(think, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not has_begun(think, "What does <think> mean?<|im_end|>\n<|im_start|>assistant\n")
    assert has_begun(think, "<think> I was", is_continued=True)
    assert not has_begun(think, "<think> I was</think> Hello", is_continued=True)


def test_a_model_without_markers_has_no_reader(load: Load) -> None:
    syntax = ModelSyntax(load(("<x>",)))
    assert syntax.reading(ToolUse(), [1, 2]) == (None, frozenset())
    make, _ = syntax.reading(USE, [1, 2])  # but its template knows no tools, and so a message tells of them
    assert make is not None
    text = ANSWERS["json_tools"][0]
    reader = make()
    assert len(Message.of(reader.feed(text) + reader.finish()).calls) == 2


def test_special_tokens_that_readers_must_see(load: Load) -> None:
    tokens = (*FAMILIES["kimi_k2"].tokens, "<|media|>", "<think>", "</think>")
    template = "{% for tool in tools %}<|tool_calls_section_begin|>{% endfor %}"
    syntax = ModelSyntax(load(tokens, template))
    shown = {FIRST_ID + i for i, token in enumerate(tokens) if token != "<|media|>"}
    assert syntax.reading(USE, [1])[1] == shown
    assert syntax.reading(ToolUse(), [1])[1] == {FIRST_ID + len(tokens) - 2, FIRST_ID + len(tokens) - 1}
    tokenizer = load(tokens, template)
    ids = [FIRST_ID, 97, FIRST_ID + 5, 98]
    detokenizer = tokenizer.detokenizer(shown_ids=frozenset(shown))
    assert "".join(map(detokenizer.add, ids)) == "<|tool_calls_section_begin|>ab"


def test_a_prompt_that_began_the_reasoning(load: Load) -> None:
    tokenizer = load(QWEN3_TOKENS, QWEN3, are_special=False)
    syntax = ModelSyntax(tokenizer)
    for prompt, begun, wanted in (
        ("<|assistant|><think>\n", None, Message("b", "a")),
        ("<|assistant|><think>\n\n</think>\n\n", None, Message("a</think>b")),
        ("<|assistant|><think>\nI", "<think>\nI", Message("b", "a")),
    ):
        make, _ = syntax.reading(ToolUse(), tokenizer.encode(prompt), begun=begun)
        assert make is not None
        reader = make()
        assert isinstance(reader, MessageReader)
        assert Message.of(reader.feed("a</think>b") + reader.finish()) == wanted


def test_gpt_oss(load: Load) -> None:
    syntax = ModelSyntax(load(HARMONY))
    make, shown = syntax.reading(ToolUse(), [1])
    assert make is not None
    assert isinstance(make(), HarmonyReader)
    assert shown == {FIRST_ID + i for i in range(len(HARMONY))}
