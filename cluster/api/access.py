"""One line of the log for each HTTP request, and the id by which all nodes' lines name it. Event loop only.

A line has the method, the path without its query, and numbers: nothing that a client wrote but the path.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope

from cluster.api.assets import is_asset
from cluster.log_line import checked_id
from cluster.logs import UNSAID, current_request

logger = logging.getLogger(__name__)

HEADER = "x-request-id"
ANTHROPIC_HEADER = "request-id"  # where clients of Anthropic's API look for it
MAX_PATH_CHARS = 100
# What pages and monitors ask for again and again: logged only where it fails, which a 503 of these is not.
_POLLED = frozenset(
    f"/{path}"
    for path in ("health", "metrics", *(f"v1/cluster{rest}" for rest in ("", "/logs", "/planning", "/why")))
)


@dataclass(slots=True)
class Note:
    """What the line will say. Times by time.monotonic()."""

    request_id: str
    began_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None  # since it began
    num_prompt: int | None = None  # tokens; None: the request is for no answer, or has not come so far
    num_completion: int = 0


current_note: ContextVar[Note] = ContextVar("current_note")  # of the request that this task answers


def begin(headers: Headers) -> Note:
    """The note of a request that came, with its own id if it brought one; for all that its task will log."""
    note = Note(checked_id(headers.get(HEADER, "")) or uuid.uuid4().hex)
    current_note.set(note)
    current_request.set(note.request_id)
    return note


def sign(message: Message, note: Note, *, is_anthropic: bool) -> None:
    """Add the id to the start of a response, also under the name that Anthropic's clients know."""
    headers = MutableHeaders(scope=message)
    headers[HEADER] = note.request_id
    if is_anthropic:
        headers[ANTHROPIC_HEADER] = note.request_id


def log(scope: Scope, status: int, note: Note, known_paths: Collection[str]) -> None:
    """The request is over."""
    duration_s = time.monotonic() - note.began_s
    method, path = scope["method"], scope["path"]
    if (path in _POLLED or is_asset(path)) and (status < 400 or status == 503):
        return
    if path not in known_paths:
        path = path.encode("unicode_escape").decode()[:MAX_PATH_CHARS]
    fields = {"method": method, "path": path, "status": status, "duration_s": round(duration_s, 4)}
    words = f"{method} {path} {status}, {duration_s:.3f} s"
    if note.num_prompt is not None:
        fields |= {"prompt_tokens": note.num_prompt, "completion_tokens": note.num_completion}
        words += f", {note.num_prompt} prompt and {note.num_completion} completion tokens"
    if note.first_token_s is not None:
        fields["first_token_s"] = round(note.first_token_s, 4)
        words += f", first token after {note.first_token_s:.3f} s"
    level = logging.WARNING if status >= 500 else logging.INFO
    logger.log(level, "%s", words, extra=UNSAID | {"fields": fields})
