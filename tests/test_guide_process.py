"""The same masks from a process beside, which may wait or die without harm to others."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from cluster.grammar import GrammarError, regex_grammar
from cluster.guide import Guides
from cluster.guide_process import GuideProcess
from cluster.tokenizer import load_tokenizer
from tests.test_guide import COLOUR, EOS, MODEL, VOCAB

WAIT_S = 60.0
# 1.9.1 of the library goes down in endless recursion for it, and takes its process along.
DEADLY = json.dumps({"grammars": [{"json_schema": {"const": -(2**63)}}]})


@pytest.fixture
def guides() -> Iterator[GuideProcess]:
    made = GuideProcess(MODEL, VOCAB)
    yield made
    made.close()


@pytest.mark.long
def test_the_process_ends_with_the_last_that_uses_it() -> None:
    GuideProcess(MODEL, VOCAB).open(COLOUR)
    gc.collect()  # else the test leaves it behind


def test_the_masks_are_those_of_a_guide_here(guides: GuideProcess) -> None:
    tokenizer = load_tokenizer(MODEL)
    answer = tokenizer.encode('{"c": "grün"}')
    plain, remote = Guides(MODEL, VOCAB).open(COLOUR), guides.open(COLOUR)
    for length in [*range(len(answer) + 1), 2, 5, 3, 0, len(answer), 4]:
        if length % 2:
            remote.expect(answer[:length])
        np.testing.assert_array_equal(remote.allowed(answer[:length]), plain.allowed(answer[:length]))
    remote.expect([*answer[:3], 9, 9])  # a draft that is refused
    assert remote.allowed([*answer[:4], *tokenizer.encode("zzz")]) is None
    np.testing.assert_array_equal(remote.allowed(answer[:6]), plain.allowed(answer[:6]))
    assert remote.allowed([EOS]) is None


def test_without_a_process_the_request_ends_with_a_sentence(guides: GuideProcess) -> None:
    guides._command[0] = str(MODEL / "no such program")
    with pytest.raises(GrammarError, match="no process can be started for grammars: "):
        guides.open(COLOUR)


@pytest.mark.long
def test_several_at_once_and_one_that_cannot_be_followed(guides: GuideProcess) -> None:
    bad, good, other = guides.open("start: a"), guides.open(regex_grammar("ab?")), guides.open(COLOUR)
    with pytest.raises(GrammarError, match="it is no list of grammars"):
        bad.allowed([])
    assert other.allowed([]) is not None
    assert good.ready.result(WAIT_S)
    del bad
    assert good.allowed([]) is not None


@pytest.mark.long
def test_a_grammar_that_ends_the_process_ends_its_own_answers_only(guides: GuideProcess) -> None:
    guides.open(COLOUR).allowed([])
    process = guides.open(COLOUR)._child.process
    deadly = guides.open(DEADLY)
    process.send_signal(signal.SIGKILL)  # should another release survive it
    with pytest.raises(GrammarError, match="the grammar library ended without an answer"):
        deadly.allowed([])
    process.wait(WAIT_S)
    with pytest.raises(GrammarError, match="the grammar library ended without an answer"):
        deadly.allowed([1])
    assert guides.open(COLOUR).allowed([]) is not None
