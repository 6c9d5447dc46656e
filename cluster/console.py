"""Lines for people on standard error. Any thread; a closed terminal or a full disk never harms a ring."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def say(line: str, stream: TextIO | None = None) -> None:
    """Print one line; it is lost where nobody can take it."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(line, file=stream or sys.stderr, flush=True)
