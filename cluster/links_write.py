"""Puts measured links into a cluster file: only `links` changes, and the file is replaced as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.console import as_word
from cluster.errors import EXIT_ERROR, EXIT_USAGE, UserError
from shard_loader.whole_file import write_whole


def write_links(path: Path, links: Sequence[dict[str, Any]]) -> None:
    """Replace the entries of the measured pairs in the file's `links`, keep the others.

    Keys, values and their order stay, and so do the indentation and the file's mode; it is JSON again.
    Raises UserError for YAML, for the older forms, which have no links, and where the file cannot be written.
    """
    target = path.resolve()
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError(
            f"{path} is YAML, whose comments would be lost: copy the links of macrame links --json by hand",
            EXIT_USAGE,
        )
    try:
        text = target.read_text(encoding="utf-8-sig")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}", EXIT_USAGE) from None
    if not isinstance(document, dict) or "nodes" not in document:
        raise UserError(
            f"{path} is of an older form, which has no links; write it as docs/configuration.md says",
            EXIT_USAGE,
        )
    if not target.stat().st_mode & 0o222:
        raise UserError(f"{path} is read-only: make it writable with chmod u+w {as_word(path)}", EXIT_ERROR)
    measured = {frozenset(link["between"]) for link in links}
    kept = [link for link in document.get("links") or [] if frozenset(link["between"]) not in measured]
    document["links"] = [*kept, *links]
    try:
        content = json.dumps(document, indent=_indent(text), ensure_ascii=False) + "\n"
        mode = target.stat().st_mode & 0o7777
        write_whole(target, content.encode(), mode)
        target.chmod(mode)  # whatever the umask took
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", EXIT_ERROR) from None


def _indent(text: str) -> int:
    """By how much the file's first key is indented."""
    found = re.match(r"\{\s*\n( +)\"", text)
    return len(found[1]) if found else 2
