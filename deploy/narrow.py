"""Tables that a narrow terminal can show too: where a row is too long, one block of lines for each. Pure."""

from __future__ import annotations

import shutil
import textwrap
from typing import TextIO

from planner.render import table

_JOIN = "\N{NO-BREAK SPACE}"  # within a value, so that a line never ends between a number and its unit


def width_of(stream: TextIO) -> int | None:
    """The columns of the terminal that `stream` is; None for what is none: a file has room."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def fitted(rows: list[dict[str, str]], width: int | None) -> list[str]:
    """A table, or where that is wider than `width`, each row as lines of `column value`."""
    lines = table(rows)
    if width is None or max(map(len, lines), default=0) <= width:
        return lines
    blocks: list[str] = []
    for row in rows:
        parts = [f"{name} {value}".strip().replace(" ", _JOIN) for name, value in row.items() if value]
        wrapped = textwrap.wrap(
            ", ".join(parts), max(20, width), subsequent_indent="  ", break_long_words=False
        )
        blocks += [line.replace(_JOIN, " ") for line in wrapped]
    return blocks
