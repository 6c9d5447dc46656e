"""One real run_node process that is expected to end by itself, and the files it is started with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ring_processes import free_ports


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code, the last line of its standard error, and all of that."""

    code: int
    sentence: str
    text: str = field(default="", compare=False)


def node(**values: Any) -> dict[str, Any]:
    """A node of a cluster file on a free port; memory and chip are known, so planning waits for no node."""
    return {"host": "127.0.0.1", "port": free_ports(1)[0], "memory_gb": 16, "chip": "Apple M4", **values}


def write_cluster(directory: Path, model: Path | str, *nodes: Mapping[str, Any], **values: Any) -> Path:
    """A cluster file."""
    path = directory / "cluster.json"
    document = {"model": str(model), "context": 64, "nodes": list(nodes), **values}
    path.write_text(json.dumps(document))
    return path


def start_node(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """A node with its output in pipes, the leader of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.run_node", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 20.0) -> Ended:
    """Waits for the end; its user is spared tracebacks."""
    with process:
        try:
            _, text = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert "Traceback" not in text, text
    lines = text.strip().splitlines()
    return Ended(process.returncode, lines[-1] if lines else "", text)


def wait_line(process: subprocess.Popen[str], text: str) -> None:
    """Until the node has written the text to standard error."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the node ended with {process.wait()} before it said {text!r}")


def run_node(*arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Ended:
    """Starts a node and waits until it has ended."""
    return finish(start_node(*arguments, env=env, cwd=cwd))
