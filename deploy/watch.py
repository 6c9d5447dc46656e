"""Shows something again and again until Ctrl-C: in place on a terminal, one after the other elsewhere.

Main thread only.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from cluster.errors import EXIT_OK, UserError

DEFAULT_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 86400.0
_OTHER_SCREEN, _OWN_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def add_watch(parser: argparse.ArgumentParser) -> None:
    """--watch, with how often."""
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=DEFAULT_INTERVAL_S,
        metavar="S",
        help=f"show it again every S seconds (default {DEFAULT_INTERVAL_S:g}) until Ctrl-C; with --json, one "
        "object a line",
    )


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be seconds from {MIN_INTERVAL_S} to {MAX_INTERVAL_S:.0f}"
        )
    return seconds


def watch(frame: Callable[[], str], interval_s: float, *, trouble: Callable[[UserError], str] = str) -> int:
    """Shows `frame()` every `interval_s`; where that raises UserError, what `trouble` makes of it.

    Ends with exit code 0 by Ctrl-C or SIGTERM; a terminal is left with the last frame.
    """
    is_terminal = sys.stdout.isatty()
    text = ""
    with _until_stopped(), _other_screen(is_terminal):
        while True:
            begin = time.monotonic()
            try:
                text = frame()
            except UserError as error:
                text = trouble(error)
            if is_terminal:
                _draw(text)
            else:
                print(text, flush=True)
            time.sleep(max(0.0, interval_s - (time.monotonic() - begin)))
    if is_terminal:
        print(text)
    return EXIT_OK


def _draw(text: str) -> None:
    columns, rows = shutil.get_terminal_size()
    lines = [f"{part}{_REST_OF_LINE}" for line in text.splitlines() for part in _parts(line, columns)]
    if len(lines) > rows:
        lines = [*lines[: rows - 1], f"(more: a higher window shows it){_REST_OF_LINE}"[:columns]]
    sys.stdout.write(_HOME + "\r\n".join(lines) + _REST_OF_SCREEN)
    sys.stdout.flush()


def _parts(line: str, columns: int) -> list[str]:
    """The line, or several where it is longer than the terminal is wide."""
    if len(line) <= columns:
        return [line]
    return textwrap.wrap(line, columns, subsequent_indent="  ")


@contextlib.contextmanager
def _until_stopped() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP act as Ctrl-C does, which ends it without an error."""
    previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _other_screen(is_terminal: bool) -> Iterator[None]:
    """The terminal's second screen, so that what stood on it comes back."""
    if not is_terminal:
        yield
        return
    sys.stdout.write(_OTHER_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(_OWN_SCREEN)
        sys.stdout.flush()
