"""Whom of those that run a prompt begins with, and what finding out costs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.kept import MIN_COMMON
from cluster.prefix_cache import PrefixCache
from cluster.request import Request
from cluster.room import Limits
from proto import ring_pb2

LIMITS = Limits(1000, 64, 4, 64, trim_window=1 << 40)


class Prompt(list[int]):
    """It counts the tokens that are compared in slices."""

    num_sliced = 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            Prompt.num_sliced += len(range(*index.indices(len(self))))
        return super().__getitem__(index)


def request(session: int, tokens: list[int], num_sent: int = 0) -> Request:
    one = Request(str(session), session, Prompt(tokens), 10, ring_pb2.Sampling(), frozenset())
    one.is_active, one.is_open, one.num_sent = True, num_sent > 0, num_sent
    return one


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_one_that_has_read_most_of_it(seed: int) -> None:
    draws = random.Random(seed)
    base = [draws.randrange(3) for _ in range(120)]
    running = []
    for session in range(1, 9):
        tokens = [*base[: draws.randrange(1, 121)], *(draws.randrange(3) for _ in range(draws.randrange(5)))]
        running.append(request(session, tokens, draws.randrange(1, len(tokens) + 1)))
    mine = request(9, base)
    most = 0
    for other in running:
        end = min(other.num_sent, len(other.prompt) - 1, len(base) - 1)
        most = max(most, next((i for i in range(end) if other.prompt[i] != base[i]), end))
    most = most if most >= MIN_COMMON else 0
    assert PrefixCache().begin_beside(mine, LIMITS, running) == most == mine.num_cached == mine.num_sent
    assert mine.began_beside == (most > 0) == (mine.from_session > 0)


def test_answers_to_one_prompt_are_compared_with_one_of_them() -> None:
    tokens = list(range(900))
    running = [request(session, tokens, len(tokens)) for session in range(1, 33)]
    mine = request(33, tokens)
    Prompt.num_sliced = 0
    assert PrefixCache().begin_beside(mine, LIMITS, running) == 899
    assert 899 <= Prompt.num_sliced <= 4 * 899
