"""Guesses what comes next in a text from what came before in it (prompt lookup). Pure.

Source of the idea: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Tokens that a text's end shares with an earlier place, longest first.
MATCH_LENGTHS = (8, 5, 3, 2)
_WIDTH = array("I").itemsize


@dataclass(frozen=True, slots=True)
class Guess:
    """The tokens that may come next. match: how long the end is that came before as well."""

    tokens: tuple[int, ...]
    match: int


NO_GUESS = Guess((), 0)


class NGrams:
    """The tokens of one text, with its guesses."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._bytes = bytearray()
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """What was written since."""
        self._bytes += array("I", tokens).tobytes()

    def guess(self, num_tokens: int, ahead: Sequence[int] = ()) -> Guess:
        """At most `num_tokens` behind the text and `ahead`, which is itself only guessed; NO_GUESS: nothing.

        What follows the latest place where the end came before, the longest end first. A place so near the
        end that too little follows is taken to repeat itself.
        """
        text = bytes(self._bytes) + array("I", ahead).tobytes() if ahead else self._bytes
        for match in MATCH_LENGTHS:
            place = _find(text, match)
            if place is not None:
                return Guess(_continued(text, place, num_tokens), match)
        return NO_GUESS


def _find(text: bytes | bytearray, match: int) -> int | None:
    """Behind which byte the last `match` tokens came before, latest first."""
    size = match * _WIDTH
    if len(text) <= size:
        return None
    end, stop = text[-size:], len(text) - _WIDTH
    while (place := text.rfind(end, 0, stop)) >= 0:
        if place % _WIDTH == 0:
            return place + size
        stop = place + size - 1  # it lay across tokens
    return None


def _continued(text: bytes | bytearray, start: int, num_tokens: int) -> tuple[int, ...]:
    period = (len(text) - start) // _WIDTH  # tokens from there to the end
    following = array("I", bytes(text[start : start + num_tokens * _WIDTH]))
    return tuple(following[i % period] for i in range(num_tokens))
