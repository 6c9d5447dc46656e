"""Guides: masks over the demo model's own vocabulary, whatever way the history came."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cluster.grammar import GrammarError, choice_grammar, json_schema_grammar, regex_grammar
from cluster.guide import Guide, Guides
from cluster.sampler import Sampler
from cluster.tokenizer import Tokenizer, load_tokenizer
from proto import ring_pb2
from tests.waiting import wait_for

MODEL = Path(__file__).parent.parent / "deploy" / "demo" / "model"
VOCAB = 4096
EOS = 0
COLOUR = json_schema_grammar(
    {
        "type": "object",
        "properties": {"c": {"enum": ["rot", "grün"]}},
        "required": ["c"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def guides() -> Guides:
    made = Guides(MODEL, VOCAB)
    made.open(COLOUR).allowed([])  # its thread is not one that a test leaves behind
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL)


def texts(guide: Guide, tokenizer: Tokenizer, answer: list[int]) -> set[str]:
    allowed = guide.allowed(answer)
    assert allowed is not None
    assert allowed.shape == (VOCAB,)
    return {tokenizer.piece(int(token)).decode("utf-8", "replace") for token in np.flatnonzero(allowed)}


def test_only_what_continues_the_grammar_is_allowed(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.open(choice_grammar(["red", "green"]))
    first = texts(guide, tokenizer, [])
    assert {"r", "g"} <= first
    assert all(text and ("red".startswith(text) or "green".startswith(text)) for text in first)
    answer = tokenizer.encode("gre")
    assert all("en".startswith(text) for text in texts(guide, tokenizer, answer))


def test_the_end_comes_where_the_answer_is_whole_and_nothing_after_it(
    guides: Guides, tokenizer: Tokenizer
) -> None:
    guide = guides.open(regex_grammar("ab?"))
    assert EOS not in np.flatnonzero(guide.allowed([]))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert set(np.flatnonzero(guide.allowed([a]))) == {EOS, b}
    assert set(np.flatnonzero(guide.allowed([a, b]))) == {EOS}
    assert set(np.flatnonzero(guide.allowed([a, EOS]))) == {EOS}  # a client may ignore it
    assert set(np.flatnonzero(guide.allowed([a, EOS, EOS]))) == {EOS}
    assert set(np.flatnonzero(guide.allowed([a]))) == {EOS, b}


def test_the_state_follows_the_history(guides: Guides, tokenizer: Tokenizer) -> None:
    """A replay brings all at once, a refused draft goes back: the masks are those of the plain way."""
    answer = tokenizer.encode('{"c": "grün"}')
    one_by_one = guides.open(COLOUR)
    masks = [one_by_one.allowed(answer[:length]) for length in range(len(answer) + 1)]
    at_once = guides.open(COLOUR)
    for length in [len(answer), 2, 5, 3, 0, len(answer), 4]:
        np.testing.assert_array_equal(at_once.allowed(answer[:length]), masks[length])
    wrong = tokenizer.encode("zzz")
    assert at_once.allowed(answer[:4] + wrong) is None
    np.testing.assert_array_equal(at_once.allowed(answer[:6]), masks[6])
    assert at_once.allowed([EOS]) is None  # no answer yet
    np.testing.assert_array_equal(at_once.allowed([]), masks[0])


def test_draws_keep_to_the_grammar_whatever_the_logits_say(guides: Guides, tokenizer: Tokenizer) -> None:
    """Greedy and with every filter: the first allowed token by the model's own order, never another."""
    logits = mx.arange(VOCAB, dtype=mx.float32) / 100  # the last tokens are the most probable
    prompt = tokenizer.encode("a colour:")
    plain: dict[str, Any] = {"temperature": 0.0}
    for fields in (
        plain,
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.3, "min_p": 0.1},
    ):
        sampler = Sampler(ring_pb2.Sampling(**fields), VOCAB, guides.open(COLOUR))
        history = list(prompt)
        for _ in range(40):
            draw = sampler.draw(logits, len(history), history, len(prompt))
            mx.eval(draw.arrays())
            history.append(draw.finish().id)
            if history[-1] == EOS:
                break
        text = tokenizer.decode(history[len(prompt) :], skip_special=True)
        assert "".join(text.split()) in ('{"c":"rot"}', '{"c":"grün"}'), text


def test_tokens_that_the_model_has_and_the_tokenizer_has_not_are_never_drawn(tokenizer: Tokenizer) -> None:
    guide = Guides(MODEL, VOCAB + 64).open(json_schema_grammar({}))
    allowed = guide.allowed([])
    assert allowed is not None
    assert allowed.shape == (VOCAB + 64,)
    assert allowed.any()
    assert not allowed[VOCAB:].any()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (json_schema_grammar({"not": {}}), "the grammar cannot be followed: Unimplemented keys"),
        ("start: a", "it is no list of grammars"),
    ],
)
def test_a_bad_grammar_ends_its_own_request(guides: Guides, grammar: str, message: str) -> None:
    guide = guides.open(grammar)
    with pytest.raises(GrammarError, match=message):
        guide.allowed([])


def test_a_model_without_an_end_cannot_keep_to_one() -> None:
    with pytest.raises(GrammarError, match="no token ends an answer of this model"):
        Guides(MODEL, 0)._read_vocabulary()


def test_what_was_expected_is_ready_and_what_was_not_is_right(guides: Guides, tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode('{"c": "rot"}')
    plain, guide = guides.open(COLOUR), guides.open(COLOUR)
    for length in range(len(answer)):
        guide.expect(answer[:length])
        assert guides.prepare() or length
        np.testing.assert_array_equal(guide.allowed(answer[:length]), plain.allowed(answer[:length]))
        guide.expect(answer[: length + 1])
    guide.expect(tokenizer.encode("nonsense"))  # a draft that is refused
    assert guides.prepare()
    np.testing.assert_array_equal(guide.allowed(answer[:3]), plain.allowed(answer[:3]))
    assert not guides.prepare()


def test_the_next_mask_is_made_while_the_token_travels(guides: Guides, tokenizer: Tokenizer) -> None:
    guide, other = guides.open(COLOUR), guides.open(COLOUR)
    tokens = []
    for one in (guide, other):
        draw = Sampler(ring_pb2.Sampling(), VOCAB, one).draw(mx.zeros((VOCAB,)), 1, [5], 1)
        tokens.append(draw.finish().id)
    assert guides.prepare()
    assert guide._prepared is not None
    mask = guide._prepared[1]
    assert guide.allowed(tokens[:1]) is mask
    assert guides.prepare()
    assert not guides.prepare()
    assert other._prepared is not None
    assert other._prepared[0] == tokens[1:]


def test_a_closed_session_expects_nothing(guides: Guides) -> None:
    guide = guides.open(COLOUR)
    guide.expect([])
    assert len(guides._expecting) == 1
    del guide
    gc.collect()
    assert not guides.prepare()


def test_a_failure_that_was_expected_is_told_when_it_counts(guides: Guides) -> None:
    guide = guides.open(json_schema_grammar({"not": {}}))
    for _ in range(2):
        guide.expect([])
        assert guides.prepare()
        with pytest.raises(GrammarError, match="Unimplemented keys"):
            guide.allowed([])


def test_its_thread_ends_with_it() -> None:
    own = Guides(MODEL, VOCAB)
    num_before = threading.active_count()
    own.open(choice_grammar(["a"])).allowed([])
    assert threading.active_count() == num_before + 1
    del own
    gc.collect()
    wait_for(lambda: threading.active_count() == num_before, 2.0)
