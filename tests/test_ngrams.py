from __future__ import annotations

import random

from cluster.ngrams import MATCH_LENGTHS, NO_GUESS, Guess, NGrams


def by_hand(text: list[int], num_tokens: int) -> Guess:
    """The same, searched token by token."""
    for match in MATCH_LENGTHS:
        for place in range(len(text) - 1, match - 1, -1):
            if text[place - match : place] == text[len(text) - match :]:
                longer = list(text)
                for i in range(num_tokens):
                    longer.append(longer[place + i])
                return Guess(tuple(longer[len(text) :]), match)
    return NO_GUESS


def test_what_came_before_is_taken_to_come_again() -> None:
    text = NGrams([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert text.guess(3) == Guess((4, 5, 6), 2)
    text.extend([4])
    assert text.guess(2) == Guess((5, 6), 3)
    assert text.guess(2, ahead=[5]) == Guess((6, 9), 3)
    assert text.guess(2, ahead=[7]) is NO_GUESS


def test_what_repeats_itself_is_taken_to_go_on() -> None:
    assert NGrams([7, 1, 2, 3, 1, 2, 3]).guess(7) == Guess((1, 2, 3, 1, 2, 3, 1), 3)
    assert NGrams([0, 0, 0]).guess(4) == Guess((0, 0, 0, 0), 2)


def test_nothing_is_guessed_of_what_never_came() -> None:
    assert NGrams([]).guess(4) is NO_GUESS
    assert NGrams([1, 2]).guess(4) is NO_GUESS
    assert NGrams(range(1000)).guess(4) is NO_GUESS


def test_random_texts_against_a_search_token_by_token() -> None:
    draws = random.Random(5)
    for _ in range(500):
        # Ids whose bytes look alike across the borders of tokens, too.
        ids = draws.choice(([1, 2], [0, 1, 256, 65536], [0x01010101, 0x0101, 0x01], list(range(9))))
        text = [draws.choice(ids) for _ in range(draws.randrange(60))]
        ahead = text[len(text) - draws.randrange(4) :] if text else []
        known = text[: len(text) - len(ahead)]
        grown = NGrams(known[:10])
        grown.extend(known[10:])
        assert grown.guess(6, ahead) == by_hand(text, 6)
