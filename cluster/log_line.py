"""One line of the log as a value, and how it is written: for people, as text, as JSON. Pure; any thread."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_LEVEL_NUMBERS = dict(zip(LEVELS, (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR), strict=True))
MAX_MESSAGE_CHARS = 8000
_KEPT_FIRST = 2000  # of a longer message; the rest is its end, where a traceback names the error
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
_NUMBERS = re.compile(r"\d+(\.\d+)?")
_OF_BYTES = re.compile(r" of [\d.]+ [kMG]?B\)")
_CONTROLS = {n: f"\\x{n:02x}" for n in (*range(0x20), *range(0x7F, 0xA0)) if n not in (0x09, 0x0A)}
_CONTROLS |= {0x2028: "\\u2028", 0x2029: "\\u2029"}


def checked_id(text: str) -> str:
    """The request id, or an empty string where it is none that a log line may hold."""
    return text if _REQUEST_ID.fullmatch(text) else ""


def is_progress(before: str, now: str) -> bool:
    """The same words about a load as before, with other bytes: such a line takes the other's place."""
    is_load = _OF_BYTES.search(before) and _OF_BYTES.search(now)
    return bool(is_load) and _NUMBERS.sub("", before) == _NUMBERS.sub("", now)


@dataclass(frozen=True, slots=True)
class LogLine:
    """What was logged. `said`: before what a terminal shows it, however low its level; False: never there."""

    time_s: float  # Unix time
    level: str
    source: str  # the logger's name
    message: str  # may have several lines
    request_id: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # what the message says, for JSON
    said: str | bool = ""

    @property
    def level_number(self) -> int:
        """As the logging module counts."""
        return _LEVEL_NUMBERS.get(self.level, logging.INFO)


def line_of(record: logging.LogRecord, *, request_id: str, hides_errors: bool) -> LogLine:
    """A record as a line. `hides_errors`: tracebacks lack the errors' words, which may quote a request."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # its arguments do not fit: a mistake of ours, and no reason to fail
        message = str(record.msg)
    if record.exc_info is not None and record.exc_info[1] is not None:
        message += "\n" + _traceback(record.exc_info[1], hides_errors)
    elif record.exc_text:
        message += "\n" + record.exc_text
    return LogLine(
        time_s=record.created,
        level=next((name for name in reversed(LEVELS) if record.levelno >= _LEVEL_NUMBERS[name]), LEVELS[0]),
        source=record.name,
        message=cut(message.translate(_CONTROLS), MAX_MESSAGE_CHARS),
        request_id=checked_id(getattr(record, "request_id", "") or request_id),
        fields=getattr(record, "fields", {}),
        said=getattr(record, "said", ""),
    )


def _traceback(error: BaseException, hides_errors: bool) -> str:
    told = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = told
    while hides_errors and one is not None:
        one._str = "(not logged)"  # type: ignore[attr-defined]
        one = one.__cause__ or one.__context__
    return "".join(told.format()).rstrip("\n").translate(_CONTROLS)


def cut(message: str, max_chars: int) -> str:
    """The message, or its beginning and its end."""
    if len(message) <= max_chars:
        return message
    first = min(_KEPT_FIRST, max_chars // 4)
    return f"{message[:first]} [...] {message[len(message) - (max_chars - first - 7) :]}"


def as_plain(line: LogLine) -> str:
    """For a terminal."""
    if isinstance(line.said, str) and line.said:
        return line.said + line.message
    when = datetime.fromtimestamp(line.time_s).strftime("%Y-%m-%d %H:%M:%S")
    about = f" [{line.request_id}]" if line.request_id else ""
    return f"{when} {line.level.upper()} {line.source}:{about} {line.message}"


def as_text(line: LogLine, node: str) -> str:
    """Time, level, node, source, request id or -, message. Indented lines continue it."""
    request_id = line.request_id or "-"
    message = line.message.replace("\n", "\n    ")
    return f"{_utc(line.time_s)} {line.level.upper()} {node} {line.source} {request_id} {message}"


def as_json(line: LogLine, node: str, rank: int) -> str:
    """One object: time, level, rank, node, source, request_id, message, and the message's own values."""
    content = {
        "time": _utc(line.time_s),
        "level": line.level,
        "rank": rank,
        "node": node,
        "source": line.source,
        "request_id": line.request_id or None,
        "message": line.message,
    }
    return json.dumps({**content, **line.fields, **content}, ensure_ascii=False)


def _utc(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_wire(line: LogLine) -> str:
    """For another process, without newlines; `record_from` reads it."""
    return json.dumps(asdict(line))


def record_from(text: str) -> logging.LogRecord:
    """The record of a line that `to_wire` wrote. ValueError, KeyError or TypeError: it is none."""
    values = json.loads(text)
    return logging.makeLogRecord(
        {
            "name": str(values["source"]),
            "levelno": _LEVEL_NUMBERS[values["level"]],
            "levelname": values["level"].upper(),
            "msg": "%s",
            "args": (str(values["message"]),),
            "created": float(values["time_s"]),
            "request_id": str(values["request_id"]),
            "fields": dict(values["fields"]),
            "said": values["said"],
        }
    )
