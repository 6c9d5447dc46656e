"""The argument parser of every command: help that reads as a short man page, usage errors of one line.

A usage error ends with exit code 3. Main thread only.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

from cluster.errors import EXIT_USAGE

EXIT_CODES = "exit codes: 0 fine, 1 failed, 2 does not fit, 3 usage or config, 4 not reachable"
_is_asked = ContextVar("is_asked", default=False)


class Parser(argparse.ArgumentParser):
    """argparse, with examples (command line, what it does) below the options, and the exit codes."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Page)
        super().__init__(*args, **kwargs)
        self._examples = tuple(examples)

    def error(self, message: str) -> NoReturn:
        """Print one line and end the process."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")

    def format_help(self) -> str:
        """Usage, description, options, examples, exit codes."""
        lines = [super().format_help()]
        if self._examples:
            lines.append("\nexamples:\n")
            lines += [f"  {command}\n      {what}\n" for command, what in self._examples]
        return "".join([*lines, f"\n{EXIT_CODES}\n"])

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's, but within `parser_of` it hands the parser over instead."""
        if _is_asked.get():
            raise _FoundParser(self)
        return super().parse_known_args(*args, **kwargs)


class _FoundParser(Exception):  # noqa: N818  # no error: it carries a parser out of a command's main
    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


class _Page(argparse.HelpFormatter):
    """Wraps a text's paragraphs, but for those with an indented line: they are shown as they stand."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = []
        for part in text.strip("\n").split("\n\n"):
            is_laid_out = any(line.startswith(" ") for line in part.splitlines())
            parts.append(part if is_laid_out else super()._fill_text(part, width, indent))
        return "\n\n".join(parts)


def parser_of(main: Callable[[list[str]], int]) -> Parser:
    """The parser that a command's `main` makes, without running the command."""
    with _asking():
        try:
            main([])
        except _FoundParser as found:
            return found.parser
    raise TypeError(f"{main.__module__}.main parses no arguments")


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    token = _is_asked.set(True)
    try:
        yield
    finally:
        _is_asked.reset(token)
