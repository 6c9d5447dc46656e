"""A real `macrame up` and what it says as JSON lines, for tests; and a config for it on free ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from deploy.demo.run import CONFIG
from deploy.local_ring import free_ports
from deploy.up_record import cluster_folder
from tests.waiting import PATIENT_S

WAIT_S = 60.0


def write_config(folder: Path, *, host: str = "127.0.0.1", names: str = "ab", **values: Any) -> Path:
    """Nodes with the demo's model, cut where it is known to be legal, and an API, on free ports."""
    ports = free_ports("127.0.0.1", len(names) + 1)
    cuts = {1: [0, 9], 2: [0, 3, 9], 3: [0, 3, 8, 9]}[len(names)]
    nodes = [
        {"name": name, "host": host, "port": port, "memory_gb": 16, "layers": f"{start}:{stop}"}
        for name, port, start, stop in zip(names, ports, cuts, cuts[1:], strict=False)
    ]
    model = str(CONFIG.parent / "model")
    document = {"model": model, "context": 256, "nodes": nodes, "silence_timeout_s": PATIENT_S}
    path = folder / "cluster.json"
    path.write_text(json.dumps(document | {"api": {"port": ports[-1]}} | values, indent=2))
    return path


class Up:
    """The process; events are read in order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def wait(self, kind: str, **values: Any) -> dict[str, Any]:
        """The next event of this kind with these values."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if event["event"] == kind and values.items() <= event.items():
                return event
        raise AssertionError(f"no {kind} {values}; {self.process.wait()} {self.error()} {self.events}")

    def kinds(self) -> list[str]:
        """Of all events that were read."""
        return [event["event"] for event in self.events]

    def finish(self) -> int:
        """Reads the rest; the exit code."""
        assert self.process.stdout is not None
        self.events += [json.loads(line) for line in self.process.stdout]
        return self.process.wait(WAIT_S)

    def error(self) -> str:
        """What it wrote to standard error, after its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


@contextmanager
def up(config: Path, *arguments: str) -> Iterator[Up]:
    """Nodes that are left at the end of the block are stopped."""
    command = [sys.executable, "-m", "deploy.up", "--config", str(config), "--json", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield Up(process)
        finally:
            process.kill()
            down(config)


def down(config: Path) -> dict[str, Any]:
    """What `macrame down --json` says, and its exit code."""
    command = [sys.executable, "-m", "deploy.down", "--config", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    return {**json.loads(done.stdout), "code": done.returncode}


def pid_of(config: Path, rank: int) -> int:
    """Of a node of this machine."""
    record = cluster_folder(config) / f"rank-{rank}" / "started.json"
    return int(json.loads(record.read_text())["pid"])


def left_over(folder: Path) -> list[str]:
    """Nodes with files in this folder that still run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "cluster.run_node" in command and any(str(folder) in word for word in command):
            found.append(" ".join(command))
    return found


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127.") and name:
                return str(address.address)
    return None


def files_of(config: Path, rank: int) -> dict[str, int]:
    """Relative name and mode of a node's files on this machine."""
    folder = cluster_folder(config) / f"rank-{rank}"
    return {
        os.path.relpath(path, folder): path.stat().st_mode & 0o777
        for path in folder.rglob("*")
        if path.is_file()
    }
