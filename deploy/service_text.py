"""What `macrame service` prints: an installation, and how services stand. Pure."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from deploy.units import Found, Installation, State


def commands(plan: Installation) -> list[str]:
    """What a person would type instead, indented."""
    return [f"    {shlex.join(['sudo', *command.words])}" for command in plan.start if not command.may_fail]


def as_text(plan: Installation) -> list[str]:
    """Everything that installing would do."""
    lines = []
    for folder in plan.folders:
        owner = f" of {folder.account.name}" if folder.account else ""
        lines.append(f"# folder{owner}, made if missing: {folder.path}")
    for file in plan.files:
        owner = f" of {file.account.name}" if file.account else ""
        lines += ["", f"# file{owner}, mode {file.mode:o}: {file.path}", file.content.rstrip("\n")]
    return [*lines, "", "# commands", *commands(plan)]


def as_json(plan: Installation) -> dict[str, Any]:
    """The same as a JSON object."""
    return {
        "folders": [str(folder.path) for folder in plan.folders],
        "files": [
            {
                "path": str(file.path),
                "mode": f"{file.mode:o}",
                "owner": file.account.name if file.account else "root",
                "content": file.content,
            }
            for file in plan.files
        ],
        "commands": [list(command.words) for command in plan.start],
    }


def row(one: Found, now: State) -> dict[str, str]:
    """One service in the table of `status`."""

    def text(value: object) -> str:
        return "" if value is None else str(value)

    return {
        "service": one.name,
        "state": now.word,
        "rank": text(one.rank),
        "user": text(one.user),
        "pid": text(now.pid),
        "starts": text(now.num_starts),
        "last exit": text(now.last_exit),
        "config": text(one.config),
    }


def row_json(one: Found, now: State) -> dict[str, Any]:
    """The same as a JSON object."""
    return {**asdict(one), "file": str(one.file), "state": now.word, **_numbers(now)}


def _numbers(now: State) -> dict[str, Any]:
    return {"is_well": now.is_well, "pid": now.pid, "last_exit": now.last_exit, "num_starts": now.num_starts}
