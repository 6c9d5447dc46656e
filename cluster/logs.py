"""The log of one process: what goes to standard error, to a file, to the head. The main thread sets it up.

Nothing is logged for a token: lines are about requests, states and errors. No line holds a prompt, a token, a
key or an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cluster.console import say
from cluster.errors import EXIT_USAGE, UserError
from cluster.log_line import LogLine, as_json, as_plain, as_text, line_of, record_from, to_wire
from cluster.log_writer import LogWriter, RotatingFile
from cluster.recent_lines import RecentLines

FORMATS = ("text", "json")
RELAYED = "API_LOG"  # begins a line of the HTTP process' standard output that holds a line of its log
UNSAID = {"said": False}  # as `extra`: a terminal does not show the line
OWN_PACKAGES = ("cluster", "deploy", "kernels", "planner", "shard_loader")

current_request: ContextVar[str] = ContextVar("current_request", default="")  # its id, for all that is logged


def said(before: str) -> dict[str, object]:
    """As `extra`: a terminal shows the line after these words, without time and level."""
    return {"said": before}


@dataclass(frozen=True, slots=True)
class LogChoices:
    """What the user asked for. form: text, json, or None for lines as people read them, from `level` on."""

    form: str | None = None
    file: Path | None = None
    is_verbose: bool = False
    level: int = logging.WARNING


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """--log-format, --log-file and --verbose."""
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        help="write every line of the log to standard error in this form (default: states and warnings only)",
    )
    parser.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="also write the log there; rotated at 10 MB, 5 old files",
    )
    parser.add_argument("--verbose", action="store_true", help="log more, and show tracebacks")


def log_choices(args: argparse.Namespace) -> LogChoices:
    """What `add_log_arguments` has read."""
    return LogChoices(args.log_format, args.log_file, args.verbose)


class Logs(logging.Handler):
    """Gets every record of the process and gives it to each place where it belongs."""

    def __init__(self, choices: LogChoices, rank: int, *, hides_errors: bool = False) -> None:
        super().__init__(logging.INFO)
        self.node, self.rank = f"rank {rank}", rank
        self.recent = RecentLines()
        self._hides_errors = hides_errors
        self._writers: list[LogWriter] = []
        self._file: RotatingFile | None = None
        self._sinks: list[Callable[[LogLine], None]] = [self.recent.add]
        if choices.file is not None:
            self._file = _open(choices.file, self._formed(choices.form or "text"))
            self._write_to(self._file, str(choices.file))
        if choices.form is None:
            level = logging.INFO if choices.is_verbose else choices.level
            self._sinks.append(lambda line: _show(line, level))
        else:
            form = self._formed(choices.form)
            self._write_to(lambda line: _print(form(line), sys.stderr), "standard error")

    @classmethod
    def relayed(cls, rank: int) -> Logs:
        """Of the HTTP process: all lines go to the parent, through standard output."""
        logs = cls(LogChoices(), rank, hides_errors=True)
        logs._sinks = []
        logs._write_to(_write_relayed, "the node")
        return logs

    def begin(self) -> None:
        """From now on all loggers of this process."""
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(logging.WARNING)
        for package in OWN_PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)

    def end(self, timeout_s: float = 0.3) -> None:
        """Write what still waits, as far as the time allows."""
        logging.getLogger().removeHandler(self)
        for writer in self._writers:
            writer.close(timeout_s)
        if self._file is not None:
            self._file.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging, on the thread that logs."""
        line = line_of(record, request_id=current_request.get(), hides_errors=self._hides_errors)
        for sink in self._sinks:
            sink(line)

    def _formed(self, form: str) -> Callable[[LogLine], str]:
        if form == "json":
            return lambda line: as_json(line, self.node, self.rank)
        return lambda line: as_text(line, self.node)

    def _write_to(self, write: Callable[[LogLine], None], name: str) -> None:
        writer = LogWriter(write, name=name)
        self._writers.append(writer)
        self._sinks.append(writer)


def relay(text: str) -> None:
    """Log a line of the HTTP process as if it were ours; what is none is dropped."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        record = record_from(text)
        logging.getLogger(record.name).handle(record)


def _open(path: Path, form: Callable[[LogLine], str]) -> RotatingFile:
    try:
        return RotatingFile(path, form)
    except OSError as error:
        raise UserError(
            f"the log file {path} cannot be written: {error.strerror or error}; give --log-file another path",
            EXIT_USAGE,
        ) from None


def _show(line: LogLine, level: int) -> None:
    """For people, at once."""
    if line.said is not False and (line.said or line.level_number >= level):
        say(as_plain(line))


def _print(text: str, stream: TextIO) -> None:
    print(text, file=stream, flush=True)


_writing = threading.Lock()


def write_line(text: str) -> None:
    """A whole line to standard output, between those of the log. Raises OSError.

    Past Python's buffers: who is stuck in a full pipe must not hold up the end of the process.
    """
    data = f"{text}\n".encode()
    with _writing:
        while data:
            data = data[os.write(1, data) :]


def _write_relayed(line: LogLine) -> None:
    write_line(f"{RELAYED} {to_wire(line)}")
