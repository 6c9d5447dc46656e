"""The line that a chat's user writes: history, completion of commands, several lines. Main thread only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from deploy.chat_commands import HELP

QUOTES = '"""'
PROMPT = ">>> "


def history_file() -> Path:
    """Where this user's lines are kept."""
    given = os.environ.get("XDG_STATE_HOME")
    if given:
        return Path(given) / "macrame" / "chat_history"
    home = Path.home()
    state = (
        home / "Library" / "Application Support" if sys.platform == "darwin" else home / ".local" / "state"
    )
    return state / "macrame" / "chat_history"


class LineInput:
    """Asks for the next message. `keeps_history`: in a file of the user's own, else in memory."""

    def __init__(self, *, keeps_history: bool = True) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(keeps_history),
            completer=WordCompleter(list(HELP), sentence=True),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=Condition(_is_open),
            prompt_continuation="... ",
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """One message. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        return unquoted(self._session.prompt(PROMPT))


def _history(keeps: bool) -> History:
    """A file that only its owner can read; memory where it cannot be made."""
    if not keeps:
        return InMemoryHistory()
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        print(f"macrame chat: no history: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")  # Alt-Enter
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _is_open() -> bool:
    """Whether the text begins with three quotes and has not ended with them: then Enter begins a new line."""
    return is_open(get_app().current_buffer.text)


def is_open(text: str) -> bool:
    """Whether three quotes at the beginning wait for those at the end."""
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def unquoted(text: str) -> str:
    """The message within three quotes, or the line itself."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and not is_open(stripped):
        return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return stripped
