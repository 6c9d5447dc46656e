"""Grammars are tried in a process of their own: what ends that one is refused, and what was good is known."""

from __future__ import annotations

import asyncio

import pytest

from cluster.api import grammar_checker
from cluster.api.grammar_checker import GrammarChecker
from cluster.grammar import GrammarError, choice_grammar, json_schema_grammar


def check(*grammars: str) -> GrammarChecker:
    async def all_of_them() -> GrammarChecker:
        checker = GrammarChecker()
        for grammar in grammars:
            await checker.check(grammar)
        return checker

    return asyncio.run(all_of_them())


def test_a_good_one_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(grammar_checker, "_ask", asked.append)
    monkeypatch.setattr(grammar_checker, "MAX_KEPT", 2)
    one, two, three = (choice_grammar([text]) for text in ("a", "b", "c"))
    checker = check("", one, two, two, one, three, two, one)
    assert asked == [one, two, three, one]
    assert list(checker._good) == [three, one]
    assert checker._pool is not None
    checker._pool.shutdown()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"const": -(2**63)}, "the grammar library fails on it; simplify it"),
    ],
)
def test_a_bad_one_is_refused(schema: object, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        grammar_checker._ask(json_schema_grammar(schema))
    assert str(caught.value) == message


def test_a_slow_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "TIMEOUT_S", 0.001)
    with pytest.raises(GrammarError, match="it takes longer than 0 s to prepare"):
        grammar_checker._ask(json_schema_grammar({}))
