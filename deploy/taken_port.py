"""Who listens on a port of this machine, and the sentence where a node's port is taken. Any thread."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from cluster.config import ClusterConfig, ConfigError, NodeConfig
from cluster.console import as_word
from cluster.errors import EXIT_ERROR, UserError
from cluster.versions import macrame_version

MAX_COMMAND = 120  # characters
UNKNOWN = ""  # somebody listens, and the system does not tell who
_UNIT = re.compile(r"/(macrame-[^/\s]+\.service)\b")


def listener(host: str, port: int) -> str | None:
    """Who listens there, in words, or UNKNOWN; None: nobody. Other troubles are run_node's to tell."""
    if not _is_taken(host, port):
        return None
    with contextlib.suppress(psutil.Error, OSError):
        if (process := _process_at(port)) is not None:
            first, *rest = process.cmdline() or [process.name()]
            command = " ".join([Path(first).name, *rest])[:MAX_COMMAND]
            return f"process {process.pid} ({command}){_unit(process.pid)}"
    return UNKNOWN


def port_taken(config: ClusterConfig, node: NodeConfig, what: str, port: int, who: str) -> UserError:
    """For a port that a node (or its API) is to listen on; `what` wants it, `who` has it, as `listener` says.

    A node of macrame's that has it is asked which it is.
    """
    by = f" by {who}" if who else ""
    whose = by or " by a process of another user"
    found = _ask(config, node) if port == node.port else None
    if found is None:
        text = f"port {port} of {what} is taken{by}: stop what listens there, or write another port into the "
        return UserError(f"{text}cluster file", EXIT_ERROR)
    name, digest, version = found
    differs = [] if digest == config.digest else ["another config"]
    differs += [] if version == macrame_version() else [f"macrame {version}"]
    like = f", a node {name!r} of {' and '.join(differs)}," if differs else ""
    return UserError(
        f"{what} (rank {node.rank}) is served already{whose}{like or ','} which this "
        "macrame up did not start and leaves alone: end it there (Ctrl-C or kill; 'sudo macrame service "
        "remove' for a service, 'macrame down' for what up started with another cluster file) and run up "
        f"again, or leave the nodes to what starts them and see 'macrame status --config "
        f"{as_word(config.path)}'",
        EXIT_ERROR,
    )


def _ask(config: ClusterConfig, node: NodeConfig) -> tuple[str, str, str] | None:
    """Name, config digest and version of the macrame node that listens at the node's address, if one does."""
    from cluster.diagnosis_ports import who_answers  # gRPC is imported from here on
    from cluster.tls import own_credentials

    try:
        found = who_answers(node, own_credentials(config))
    except ConfigError:
        return None
    if found is None or isinstance(found, str):  # nobody of macrame's, or of a cluster that refuses us
        return None
    return (found.name, found.config_digest, found.macrame_version)


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False


def _process_at(port: int) -> psutil.Process | None:
    try:
        for connection in psutil.net_connections("tcp"):
            if _listens(connection, port):
                return psutil.Process(connection.pid) if connection.pid else None
    except psutil.AccessDenied:  # macOS tells it of each of our own processes, and of all only to root
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(_listens(connection, port) for connection in process.net_connections("tcp")):
                    return process
    return None


def _listens(connection: object, port: int) -> bool:
    address: Iterable[object] = getattr(connection, "laddr", ()) or ()
    return getattr(connection, "status", "") == psutil.CONN_LISTEN and list(address)[1:2] == [port]


def _unit(pid: int) -> str:
    try:
        return of_service(Path(f"/proc/{pid}/cgroup").read_text())
    except OSError:
        return ""


def of_service(cgroup: str) -> str:
    """In words, which unit of ours systemd runs a process for; empty: none. cgroup: as in cgroups(7)."""
    found = _UNIT.search(cgroup)
    return f" of the service {found[1]}" if found else ""
