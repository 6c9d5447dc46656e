"""What the border of every command does with what nobody foresaw, and with output that nobody takes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUTPUT_LOST = "standard output cannot be written"


def open_missing_streams() -> None:
    """A command that was started with a closed output (`>&-`) writes to nowhere instead of failing."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def drop_output() -> None:
    """What is printed from now on, and what waits to be, is lost: the end of the process is quiet.

    Source: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)


def unforeseen(error: Exception) -> str:
    """One sentence for an exception that no code turned into a UserError."""
    if isinstance(error, OSError) and (reason := _output_trouble()):
        drop_output()
        return f"{OUTPUT_LOST}: {reason}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror}: make room where the output or the files of this command go"
    return f"{type(error).__name__}: {error}; --verbose shows where, please report it"


def _output_trouble() -> str | None:
    """Why standard output takes nothing. What could not be written is still in its buffer, so this asks."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
