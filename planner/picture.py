"""A picture as values: boxes, lines of text and arrows at places that are known. Pure.

Lengths are logical pixels, as of a phone that is WIDTH wide; (0, 0) is at the top left. Widths of text are
estimates for a sans-serif font, on the wide side. Colours are those of Okabe and Ito, which people with any
kind of colour vision tell apart (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

WIDTH = 400.0
MARGIN = 14.0
BLUE, ORANGE, PINK, GREEN, SKY, RED, YELLOW = (
    *("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#F0E442"),
)
INK, GREY, FAINT, PAPER, LIGHT = "#1A1A1A", "#595959", "#D0D0D0", "#FFFFFF", "#F4F4F4"
CHAR_WIDTH = 0.56  # of the size, on average
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle. hatch: strokes over the fill, for what is not to be told by colour alone."""

    x: float
    y: float
    width: float
    height: float
    fill: str = PAPER
    edge: str | None = None
    is_hatched: bool = False
    is_dashed: bool = False
    name: str = ""  # what the box stands for; the id of the element in an SVG


@dataclass(frozen=True, slots=True)
class Label:
    """One line of text; y is its baseline."""

    x: float
    y: float
    text: str
    size: float = 12.0
    is_bold: bool = False
    anchor: Anchor = "start"
    color: str = INK

    @property
    def width(self) -> float:
        """About how wide it is."""
        return text_width(self.text, self.size, is_bold=self.is_bold)


@dataclass(frozen=True, slots=True)
class Arrow:
    """A line through points, with a head at its end."""

    points: tuple[tuple[float, float], ...]
    color: str = GREY


@dataclass(slots=True)
class Canvas:
    """What is drawn so far; `y` is where the next thing goes."""

    y: float = MARGIN
    items: list[Box | Label | Arrow] = field(default_factory=list)

    def add(self, *items: Box | Label | Arrow) -> None:
        self.items.extend(items)

    def paragraph(self, text: str, size: float = 12.0, color: str = INK, *, is_bold: bool = False) -> None:
        """Lines over the whole width, and `y` behind them."""
        for line in wrapped(text, WIDTH - 2 * MARGIN, size, is_bold=is_bold):
            self.y += size * 1.3
            self.add(Label(MARGIN, self.y, line, size, is_bold, color=color))

    def finish(self) -> Picture:
        """The picture, as high as it has become."""
        return Picture(WIDTH, self.y + MARGIN, tuple(self.items))


@dataclass(frozen=True, slots=True)
class Picture:
    """What to draw, from back to front."""

    width: float
    height: float
    items: tuple[Box | Label | Arrow, ...]

    @property
    def texts(self) -> list[str]:
        """Everything that is written in it."""
        return [item.text for item in self.items if isinstance(item, Label)]


def text_width(text: str, size: float, *, is_bold: bool = False) -> float:
    """About how wide `text` is in a size of font."""
    return len(text) * size * CHAR_WIDTH * (1.08 if is_bold else 1.0)


def fitted(text: str, width: float, size: float, *, is_bold: bool = False) -> str:
    """`text`, shortened in its middle until it is no wider than `width`."""
    most = max(int(width / text_width("x", size, is_bold=is_bold)), 4)
    if len(text) <= most:
        return text
    return text[: most - most // 2] + "…" + text[len(text) - most // 2 + 1 :]


def wrapped(text: str, width: float, size: float, *, is_bold: bool = False) -> list[str]:
    """`text` in lines of at most `width`."""
    return textwrap.wrap(text, max(int(width / text_width("x", size, is_bold=is_bold)), 10))


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar. amount: in whatever unit the whole bar is."""

    name: str
    amount: float
    fill: str
    is_hatched: bool = False


def bar(room: Box, segments: Iterable[Segment], total: float) -> list[Box]:
    """The segments side by side in `room`, to scale: `total` would be as wide as it."""
    boxes, at = [], room.x
    for part in segments:
        part_width = room.width * part.amount / total if total > 0 else 0.0
        if part_width > 0:
            name = f"{room.name} {part.name}"
            boxes.append(Box(at, room.y, part_width, room.height, part.fill, INK, part.is_hatched, name=name))
        at += part_width
    return boxes
