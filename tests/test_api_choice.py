"""One answer as it grows, where a reply of the head holds any number of tokens."""

from __future__ import annotations

import pytest

from cluster.api.choice import Choice, Delta, TextOptions, finite
from cluster.tokenizer import Tokenizer, load_tokenizer
from proto import head_pb2, ring_pb2
from tests.api_server import write_model
from tests.tiny_models import EOS_ID


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_model(tmp_path_factory.mktemp("choice") / "tiny"))


def reply(tokens: bytes | list[int], finish_reason: str = "") -> head_pb2.GenerateReply:
    sampled = [ring_pb2.SampledToken(id=token) for token in tokens]
    return head_pb2.GenerateReply(tokens=sampled, finish_reason=finish_reason)


def choice(tokenizer: Tokenizer, **options: object) -> Choice:
    return Choice(0, [1, 2], TextOptions(stop_ids=frozenset({EOS_ID}), **options), tokenizer)  # type: ignore[arg-type]


def text(delta: Delta | None) -> str:
    assert delta is not None
    return delta.text


def test_a_reply_of_many_tokens_is_one_delta(tokenizer: Tokenizer) -> None:
    answer = choice(tokenizer, keeps_tokens=True)
    delta = answer.feed(reply("né".encode()))
    assert delta is not None
    assert (delta.text, [token.id for token in delta.tokens], delta.offsets) == (
        "né",
        [*"né".encode()],
        [0, 1, 1],
    )
    assert (answer.num_tokens, answer.finish_reason) == (3, "")


def test_nothing_to_show_is_no_delta(tokenizer: Tokenizer) -> None:
    answer = choice(tokenizer, keeps_tokens=True, stops=("ab",))
    assert answer.feed(reply("é".encode()[:1])) is None
    assert answer.feed(reply([])) is None
    delta = answer.feed(reply("é".encode()[1:] + b"a"))
    assert delta is not None
    assert (delta.text, len(delta.tokens)) == ("é", 3)  # held-back tokens come with the next text


def test_a_token_without_text_is_shown_to_who_counts_tokens(tokenizer: Tokenizer) -> None:
    counting, reading = choice(tokenizer, keeps_tokens=True), choice(tokenizer)
    delta = counting.feed(reply("é".encode()[:1]))
    assert delta is not None
    assert (delta.text, len(delta.tokens)) == ("", 1)
    assert reading.feed(reply("é".encode()[:1])) is None


def test_a_stop_string_in_the_middle_of_a_reply(tokenizer: Tokenizer) -> None:
    answer = choice(tokenizer, keeps_tokens=True, stops=("lo",))
    delta = answer.feed(reply(b"hello, world", "length"))
    assert delta is not None
    assert (delta.text, len(delta.tokens)) == ("hel", 5)
    assert (answer.num_tokens, answer.finish_reason) == (5, "stop")


def test_the_end_of_text_is_not_shown(tokenizer: Tokenizer) -> None:
    answer = choice(tokenizer)
    assert text(answer.feed(reply([104, 105, EOS_ID], "stop"))) == "hi"
    assert (answer.num_tokens, answer.finish_reason) == (3, "stop")


def test_an_end_without_tokens_flushes(tokenizer: Tokenizer) -> None:
    answer = choice(tokenizer, stops=("abc",))
    assert answer.feed(reply(b"ab")) is None
    assert text(answer.feed(reply([], "length"))) == "ab"
    assert answer.finish_reason == "length"


def test_the_echoed_prompt_moves_the_offsets(tokenizer: Tokenizer) -> None:
    answer = Choice(0, [1], TextOptions(keeps_tokens=True), tokenizer, num_echoed=7)
    delta = answer.feed(reply(b"ab"))
    assert delta is not None
    assert delta.offsets == [7, 8]


def test_json_has_no_infinity() -> None:
    assert finite(float("-inf")) == -9999.0
    assert finite(-1.5) == -1.5
