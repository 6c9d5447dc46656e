"""Bars of characters, for memory and for time, that can be told apart without colour. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_UNICODE, _ASCII = "█▓▒░", "#=-."
_COLORS = (34, 33, 35, 2)  # blue, yellow, magenta; dim


@dataclass(frozen=True, slots=True)
class Look:
    """What the place that text goes to can show."""

    is_unicode: bool = False
    is_color: bool = False

    @property
    def glyphs(self) -> str:
        """One for each part of a bar; the last is for what is free."""
        return _UNICODE if self.is_unicode else _ASCII

    def shorten(self, text: str, width: int) -> str:
        """`text` in at most `width` characters (4 or more), with its start and its end."""
        if len(text) <= width:
            return text
        dots = "…" if self.is_unicode else ".."
        kept = width - len(dots)
        return text[: kept - kept // 2] + dots + text[len(text) - kept // 2 :]

    def paint(self, part: int, text: str) -> str:
        """`text` in the colour of a bar's part."""
        return f"\x1b[{_COLORS[part]}m{text}\x1b[0m" if self.is_color and text else text


PLAIN = Look()


def cells(amounts: Sequence[float], width: int) -> list[int]:
    """How many of `width` characters each amount gets: at least one where it is above 0.

    Amounts are 0 or more and not all 0, and `width` is at least their number.
    """
    total = sum(amounts)
    shares = [amount / total * width for amount in amounts]
    counts = [max(1, int(share)) if share > 0 else 0 for share in shares]
    while sum(counts) < width:
        neediest = max(range(len(counts)), key=lambda i: shares[i] - counts[i])
        counts[neediest] += 1
    while sum(counts) > width:
        widest = max(range(len(counts)), key=lambda i: counts[i] - shares[i] if counts[i] > 1 else -math.inf)
        counts[widest] -= 1
    return counts


def stacked(amounts: Sequence[float], width: int, look: Look) -> str:
    """A bar of one part after the other, `width` characters in all; the last amount is what is free."""
    parts = zip(cells(amounts, width), look.glyphs, strict=True)
    return "".join(look.paint(i, glyph * count) for i, (count, glyph) in enumerate(parts))


def single(share: float, width: int, look: Look) -> str:
    """A bar of a share from 0 to 1 of `width` characters, blank behind; above 0 at least one is seen."""
    count = min(width, max(round(share * width), 1 if share > 0 else 0))
    return look.paint(0, look.glyphs[0] * count) + " " * (width - count)
