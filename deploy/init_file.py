"""From machines to a cluster file: hosts, names, ports, and the text that is written. One thread."""

from __future__ import annotations

import itertools
import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.config import load_config
from cluster.config_nodes import DEFAULT_PORT
from cluster.errors import EXIT_ERROR, EXIT_USAGE, UserError
from deploy.init_probe import Machine, reachable_host
from shard_loader.whole_file import write_whole

YAML = (".yaml", ".yml")


def refuse_existing(path: Path, *, is_forced: bool) -> None:
    """Raises UserError where the file is there, and for a folder that is not."""
    if path.exists() and not is_forced:
        raise UserError(
            f"{path} is there already: --force writes over it, --output FILE writes another", EXIT_USAGE
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder {path.absolute().parent} does not exist: make it first", EXIT_USAGE)


def model_of(text: str) -> str:
    """A hub id as it is, a folder as an absolute path. Raises UserError for a folder that is not there."""
    given = text.strip()
    if not given or not given.isprintable():
        raise UserError("which model? a Hugging Face id such as org/name, or a folder", EXIT_USAGE)
    folder = Path(given).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    if given.startswith(("/", "~", ".")) or given.count("/") != 1:
        raise UserError(
            f"{given} is neither a folder here nor a Hugging Face id such as org/name", EXIT_USAGE
        )
    return given


def placed(machines: Sequence[Machine]) -> list[Machine]:
    """With hosts that the others can use and names of their own; this machine first, as the head."""
    ordered = sorted(machines, key=lambda one: one.destination is not None)
    away = [one for one in ordered if one.destination is not None]
    if away and ordered[0].destination is None:
        ordered[0] = replace(ordered[0], host=reachable_host(away))
    found: dict[str, Machine] = {}
    for one in ordered:
        others = (f"{one.name}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([one.name], others) if name not in found)
        found[name] = replace(one, name=name)
    return list(found.values())


def document(model: str, machines: Sequence[Machine], api_port: int) -> dict[str, Any]:
    """The cluster file's content; nodes of one host get ports one after another."""
    ports: Counter[str] = Counter()
    nodes = []
    for one in machines:
        node: dict[str, Any] = {"name": one.name, "host": one.host}
        if ports[one.host]:
            node["port"] = DEFAULT_PORT + ports[one.host]
        ports[one.host] += 1
        node["memory_gb"] = one.memory_bytes // 10**7 / 100
        if one.chip:
            node["chip"] = one.chip
        if one.gpu_cores:
            node["gpu_cores"] = one.gpu_cores
        nodes.append(node)
    found: dict[str, Any] = {"model": model, "nodes": nodes}
    return found | ({"api": {"port": api_port}} if api_port != 8080 else {})


def as_text(path: Path, content: dict[str, Any]) -> str:
    """YAML by the file's name, else JSON with a line for each node."""
    if path.suffix.lower() in YAML:
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    lines = [f"    {json.dumps(node, ensure_ascii=False)}" for node in content["nodes"]]
    parts = [f'  "model": {json.dumps(content["model"], ensure_ascii=False)}']
    parts.append('  "nodes": [\n' + ",\n".join(lines) + "\n  ]")
    parts += [f'  "{key}": {json.dumps(content[key])}' for key in content if key not in ("model", "nodes")]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def check(path: Path, text: str) -> None:
    """Raises ConfigError where a cluster file with this text could not be read."""
    with tempfile.TemporaryDirectory(prefix="macrame-") as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        load_config(copy)


def write(path: Path, text: str) -> None:
    """As a whole. Raises UserError."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", EXIT_ERROR) from None


def next_commands(path: Path, machines: Sequence[Machine], ssh_config: Path | None) -> list[str]:
    """What to type now: look at the plan, then start it."""
    up = ["macrame", "up", "--config", str(path)]
    away = [one for one in machines if one.destination is not None]
    if away:
        up.append("--ssh")
    for one in away:
        if one.destination != one.host:
            up += ["--ssh-to", f"{one.name}={one.destination}"]
    if away and ssh_config is not None:
        up += ["--ssh-config", str(ssh_config)]
    return [shlex.join(["plan-dry-run", "--config", str(path)]), shlex.join(up)]
