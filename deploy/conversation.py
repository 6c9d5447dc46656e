"""A conversation with a model: messages and settings, as they are sent, saved and loaded. One thread."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import EXIT_USAGE, UserError
from shard_loader.whole_file import write_whole

FORMAT = "macrame chat 1"
_PRIVATE = 0o600


@dataclass(slots=True)
class Conversation:
    """messages: role (user, assistant), content, and of some answers reasoning_content."""

    model: str
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": [*system, *self.messages], **self.settings}

    def ask(self, text: str) -> None:
        """The user's next message."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, content: str, reasoning: str = "") -> None:
        """What the model said to it; reasoning goes back to templates that want it."""
        message = {"role": "assistant", "content": content}
        self.messages.append(message | ({"reasoning_content": reasoning} if reasoning else {}))

    def take_back(self) -> str | None:
        """Remove the last message of the user and what followed; it, or None where there is none."""
        for place in range(len(self.messages) - 1, -1, -1):
            if self.messages[place]["role"] == "user":
                text = self.messages[place]["content"]
                del self.messages[place:]
                return text
        return None

    def clear(self) -> None:
        """Forget the messages; system message and settings stay."""
        self.messages.clear()

    def save(self, path: Path) -> None:
        """Readable by its owner alone. Raises UserError, also for a file that is no saved conversation."""
        if path.exists() and not _is_ours(path):
            raise UserError(f"{path} is there and is no saved chat: choose another name", EXIT_USAGE)
        content = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        try:
            write_whole(path, content.encode(), _PRIVATE)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Raises UserError for a file that is not there, or no saved conversation."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", EXIT_USAGE) from None
        except ValueError:
            content = None
        if not _is_conversation(content):
            raise UserError(f"{path} is no chat that macrame saved", EXIT_USAGE)
        return cls(content["model"], content["system"], content["messages"], content["settings"])


def _is_ours(path: Path) -> bool:
    try:
        return _is_conversation(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _is_conversation(content: Any) -> bool:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    kinds = {"model": str, "system": str, "messages": list, "settings": dict}
    if any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
        and all(isinstance(value, str) for value in message.values())
        for message in content["messages"]
    )
