"""The text that comes in by a pipe. Main thread only."""

from __future__ import annotations

import io
import sys

from cluster.errors import EXIT_USAGE, UserError


def piped() -> str | None:
    """All of standard input where it is no terminal, else None. Raises UserError for what is no text."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is no text: {error.reason} at byte {error.start}", EXIT_USAGE
        ) from None


def joined(given: str | None, piped_text: str | None) -> str | None:
    """What was piped, then what was given: `cat notes.txt | macrame chat "sum this up"`."""
    parts = [part for part in (piped_text, given) if part is not None and part.strip()]
    return "\n\n".join(part.rstrip("\n") if len(parts) > 1 else part for part in parts) or None
