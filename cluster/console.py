"""Lines for people. Any thread; a closed terminal or a full disk never harms a ring."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from shlex import quote
from typing import TextIO

from planner.bars import Look


def say(line: str, stream: TextIO | None = None) -> None:
    """Print one line; it is lost where nobody can take it."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(line, file=stream or sys.stderr, flush=True)


def as_word(path: Path) -> str:
    """As a shell takes it, in a command that a person is to copy: with quotes where it has a space."""
    return quote(str(path))


def show_anything(stream: TextIO) -> None:
    """Let `stream` write what its encoding lacks as escapes: a name in a node's script is no error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def look_of(stream: TextIO) -> Look:
    """What the reader of `stream` can see: bars of blocks in UTF-8, colour on a terminal without NO_COLOR."""
    encoding = (stream.encoding or "ascii").lower().replace("_", "-")
    is_dumb = os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
    return Look(is_unicode=encoding in ("utf-8", "utf8"), is_color=stream.isatty() and not is_dumb)
