"""Which nodes on this machine run a model, from their command lines and configs. One thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.config import ConfigError, load_config


def user_of(model: str) -> int | None:
    """The process of a node here whose config names this model of the hub; None where there is none.

    Nodes of other users, whose command lines or folders are hidden, are not seen.
    """
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        try:
            if _is_node(command) and _model_of(command, Path(process.cwd())) == model:
                return int(process.pid)
        except (psutil.Error, OSError, ConfigError):
            continue
    return None


def _is_node(command: Sequence[str]) -> bool:
    names = [Path(word).name for word in command]
    return "cluster.run_node" in names or "run_node" in names or ("macrame" in names and "node" in names)


def _model_of(command: Sequence[str], folder: Path) -> str | None:
    given = _option(command, "--config")
    if given is None:
        return None
    return load_config(folder / Path(given).expanduser(), model=_option(command, "--model")).model


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
