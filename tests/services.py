"""For the tests of services: an account, a service, a config, a program that takes a system's place."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

from deploy.init_probe import Machine
from deploy.units import Account, NodeService

ME = pwd.getpwuid(os.geteuid()).pw_name
ALICE = Account("alice", Path("/srv/alice"), 501, 20)

# The first lines of `launchctl print system/LABEL` of a daemon, as macOS 14 prints them.
LAUNCHCTL_PRINT = """\
system/org.macrame.node1 = {
\tactive count = 1
\tpath = /Library/LaunchDaemons/org.macrame.node1.plist
\ttype = LaunchDaemon
\tstate = running

\tprogram = /opt/macrame/bin/python
\targuments = {
\t\t/opt/macrame/bin/python
\t\t-m
\t}

\tenvironment = {
\t\tstate = wrong
\t}

\tdomain = system
\tminimum runtime = 10
\texit timeout = 10
\truns = 3
\tpid = 312
\timmediate reason = non-ipc demand
\tforks = 0
\texecs = 1
\tlast exit code = 1
}
"""


def node_service(**values: object) -> NodeService:
    """Rank 1 of a cluster file with a blank, a per cent and a dollar in its path."""
    given = {
        "name": "node1",
        "rank": 1,
        "config": Path("/srv/alice/my 100% $cluster/c.json"),
        "account": ALICE,
        "python": Path("/opt/macrame/bin/python"),
    }
    return NodeService(**{**given, **values})  # type: ignore[arg-type]


def write_config(folder: Path, **values: object) -> Path:
    """A cluster of this machine and another, with a token."""
    path, token = folder / "cluster.json", folder / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef")
    nodes = [{"host": "127.0.0.1"}, {"host": "mini2.example", "memory_gb": 16}]
    given = {"model": "m", "nodes": nodes, "security": {"token_file": "token"}}
    path.write_text(json.dumps({**given, **values}))
    return path


def write_program(path: Path, script: str) -> Path:
    """A shell script that writes its arguments to calls.txt beside it first."""
    path.write_text(f'#!/bin/sh\necho "$*" >> "{path.parent}/calls.txt"\n{script}\n')
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[str]:
    """What the programs of a folder were called with."""
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def machine(**values: object) -> Machine:
    """A Mac that ssh reaches."""
    given = {
        "destination": "mini2.local",
        "host": "mini2.local",
        "name": "mini2",
        "system": "macOS 15.5",
        "chip": "Apple M4",
        "gpu_cores": 10,
        "memory_bytes": 1 << 34,
    }
    return Machine(**{**given, **values})  # type: ignore[arg-type]
