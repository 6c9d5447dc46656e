"""Replaces a file as a whole: whoever reads it gets all of the new content or all of the old. Any thread."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

DEFAULT_MODE = 0o666  # like every mode here, less what the user's umask takes


def write_whole(path: Path, content: bytes, mode: int = DEFAULT_MODE) -> None:
    """The new file never has more rights than `mode`, not even at first.

    Raises OSError; then `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
