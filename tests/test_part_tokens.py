"""Which tokens bear an answer's text and its reasoning, in all families' notations, however it comes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cluster.api.choice import Choice, Delta, TextOptions
from cluster.api.harmony import HarmonyReader
from cluster.api.part_tokens import PartTokens
from cluster.api.parts import Content, Message, Part, PartReader, Reasoning
from cluster.api.tool_families import FAMILIES
from cluster.tokenizer import Tokenizer, load_tokenizer
from proto import head_pb2, ring_pb2
from tests.api_server import write_model
from tests.test_harmony import CALL, PREAMBLE, SAID, THOUGHT
from tests.test_message_reader import ANSWERS, reader_of
from tests.tiny_models import EOS_ID

SIZES = (1, 3, 1000)  # tokens in one reply at most


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_model(tmp_path_factory.mktemp("parts") / "tiny"))


def answer(
    tokenizer: Tokenizer,
    text: str,
    size: int,
    make_reader: Callable[[], PartReader] | None,
    *,
    end: str = "stop",
    **options: object,
) -> tuple[Choice, list[Delta]]:
    """`text` in tokens of a byte, with an end-of-text where it ends by itself."""
    fields: dict[str, object] = {"keeps_tokens": True, "make_reader": make_reader, **options}
    choice = Choice(0, [1], TextOptions(stop_ids=frozenset({EOS_ID}), **fields), tokenizer)  # type: ignore[arg-type]
    tokens = [*text.encode(), *([EOS_ID] if end == "stop" else [])]
    cuts, deltas = random.Random(text), []
    while tokens and not choice.finish_reason:
        num = cuts.randint(1, size)
        reply = head_pb2.GenerateReply(
            tokens=[ring_pb2.SampledToken(id=token) for token in tokens[:num]],
            finish_reason="" if tokens[num:] else end,
        )
        del tokens[:num]
        if (delta := choice.feed(reply)) is not None:
            deltas.append(delta)
    return choice, deltas


def parts_of(deltas: list[Delta]) -> list[Part]:
    return [part for delta in deltas for part in delta.as_parts()]


def check_text(parts: list[Part]) -> str:
    """The text's tokens are its bytes, no more and no less."""
    contents = [part for part in parts if isinstance(part, Content)]
    told = bytes(token.id for part in contents for token in part.tokens).decode()
    assert told == Message.of(parts).content
    return told


@pytest.mark.parametrize("size", SIZES)
def test_each_family(tokenizer: Tokenizer, size: int) -> None:
    for family, (text, _) in ANSWERS.items():
        said = "" if FAMILIES[family].is_first else "Één moment."
        whole = f"<think>\nLet me look.\n</think>\n\n{said}\n{text}"
        choice, deltas = answer(tokenizer, whole, size, lambda family=family: reader_of(family))  # type: ignore[misc]
        assert check_text(parts_of(deltas)) == said, family
        assert choice.num_reasoning_tokens == len("Let me look."), family


@pytest.mark.parametrize("size", SIZES)
def test_what_looks_like_a_call_and_is_none(tokenizer: Tokenizer, size: int) -> None:
    text = "<think>hm</think> So: <tool_call>no {call}</tool_call> and <tool"
    _, deltas = answer(tokenizer, text, size, lambda: reader_of("json_tools"))
    assert check_text(parts_of(deltas)) == "So:<tool_call>no {call}</tool_call> and <tool"
    _, deltas = answer(tokenizer, "So: <tool_call>cut", size, lambda: reader_of("json_tools"), end="length")
    assert check_text(parts_of(deltas)) == "So:<tool_call>cut"


@pytest.mark.parametrize("size", SIZES)
def test_text_before_and_behind_a_call(tokenizer: Tokenizer, size: int) -> None:
    text = f"Één.\n{ANSWERS['json_tools'][0]} Twee."
    _, deltas = answer(tokenizer, text, size, lambda: reader_of("json_tools"))
    assert check_text(parts_of(deltas)) == "Één. Twee."


@pytest.mark.parametrize("size", SIZES)
def test_gpt_oss(tokenizer: Tokenizer, size: int) -> None:
    choice, deltas = answer(tokenizer, THOUGHT + PREAMBLE + CALL, size, lambda: HarmonyReader(has_tools=True))
    assert check_text(parts_of(deltas)) == "I look."
    assert choice.num_reasoning_tokens == len("User asks.")
    _, deltas = answer(tokenizer, THOUGHT + SAID, size, HarmonyReader)
    assert check_text(parts_of(deltas)) == "Hello <b>."


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_reader", [False, True])
def test_a_stop_string_ends_the_tokens_too(tokenizer: Tokenizer, size: int, has_reader: bool) -> None:
    reader = (lambda: reader_of("json_tools")) if has_reader else None
    _, deltas = answer(tokenizer, "Één, twee, drie", size, reader, stops=(", d", "tweede"))
    assert check_text(parts_of(deltas)) == "Één, twee"


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    choice = Choice(0, [1], TextOptions(keeps_tokens=True, stop_ids=frozenset({EOS_ID})), tokenizer)
    tokens = [ring_pb2.SampledToken(id=token) for token in (*b"a", 0xC3, EOS_ID)]
    delta = choice.feed(head_pb2.GenerateReply(tokens=tokens, finish_reason="stop"))
    assert delta is not None
    assert delta.text == "a\ufffd"
    assert [token.id for token in delta.text_tokens] == [*b"a", 0xC3]


def test_reasoning_that_is_not_shown_is_counted(tokenizer: Tokenizer) -> None:
    text = "<think>hm, hm</think>Yes."
    choice, deltas = answer(tokenizer, text, 2, lambda: reader_of("json_tools"), shows_reasoning=False)
    parts = parts_of(deltas)
    assert not any(isinstance(part, Reasoning) for part in parts)
    assert check_text(parts) == "Yes."
    assert choice.num_reasoning_tokens == len("hm, hm")


def test_a_token_across_two_parts_is_the_first_ones() -> None:
    tokens = PartTokens()
    for number, start in enumerate((0, 3, 3, 8)):  # the third begins a character that the second did not end
        tokens.add(ring_pb2.SampledToken(id=number), start)
    assert [token.id for token in tokens.take(1, 5)] == [0, 1, 2]
    assert [token.id for token in tokens.take(5, 8)] == []
    assert [token.id for token in tokens.take(9, 10)] == [3]
    assert tokens.take(10, 11) == []
