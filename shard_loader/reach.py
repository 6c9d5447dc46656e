"""How far back a sequence's caches can go, for tokens that were only guessed. Pure values."""

from __future__ import annotations

from enum import IntEnum


class Reach(IntEnum):
    """Of a cache; a stage, and a ring, reaches as far as its weakest part."""

    NONE = 0  # nowhere
    MARK = 1  # to where its last marked pass began
    PASS = 2  # to any but the first token of its last pass of several; below `trim_window` anywhere
    ANY = 3  # anywhere


def can_forget(reach: Reach, trim_window: int, num_tokens: int) -> bool:
    """Whether caches can forget any of the last tokens while they hold so many."""
    return reach == Reach.ANY or (reach == Reach.PASS and num_tokens < trim_window)
