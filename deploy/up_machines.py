"""The machines of a config as `macrame up` sees them: this one, and those that it reaches over ssh.

Each machine belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from cluster.config import ApiConfig, NodeConfig
from cluster.errors import EXIT_ERROR, UserError
from deploy.client import Client
from deploy.local_node import LocalNode
from deploy.node_handle import NodeHandle
from deploy.target import ANY_ADDRESS
from deploy.up_record import Placed

HERE = "this machine"


class Machine(Protocol):
    """Where some of the nodes run. Every method may raise UserError, with exit code 4 where it is away."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def destination(self) -> str | None:
        """What ssh takes; None: this machine."""

    @property
    def poll_s(self) -> float:
        """How often its nodes are looked at."""

    @property
    def may_stop_at_once(self) -> bool:
        """Whether several threads may use its handles."""

    def connect(self) -> None:
        """From the main thread: ssh may ask for a passphrase."""

    def prepare(self, nodes: Sequence[NodeConfig], show: Callable[[str], None]) -> None:
        """Makes it able to run these nodes; says what it does."""

    def handle(self, rank: int) -> NodeHandle:
        """The process of one rank. After `prepare`, or with what an earlier `up` recorded."""

    def check_folders(self, folders: Sequence[Path]) -> None:
        """Raises UserError if a model's or adapter's folder is not there."""

    def check_ports(self, places: Sequence[tuple[str, str, int]]) -> None:
        """What listens, its host and port: raises UserError for one that is taken."""

    def client(self, api: ApiConfig, key: str | None) -> Client:
        """A way to the API of a head that runs there."""

    def placed(self, node: NodeConfig) -> Placed:
        """For the record."""

    def mend(self) -> None:
        """Connects anew after the machine was away."""

    def close(self) -> None:
        """Lets go of it; what runs there goes on. Any thread."""


class Here:
    """This machine."""

    name, destination, may_stop_at_once = HERE, None, True
    poll_s = 0.25

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[int, LocalNode] = {}

    def connect(self) -> None:
        """Nothing to do, as in the other methods that are empty."""

    def prepare(self, nodes: Sequence[NodeConfig], show: Callable[[str], None]) -> None:
        """macrame is installed here."""

    def handle(self, rank: int) -> LocalNode:
        """See Machine."""
        if rank not in self._handles:
            self._handles[rank] = LocalNode(self._folder / f"rank-{rank}", rank)
        return self._handles[rank]

    def check_folders(self, folders: Sequence[Path]) -> None:
        """They were found here when the config was read."""

    def check_ports(self, places: Sequence[tuple[str, str, int]]) -> None:
        """See Machine."""
        for what, host, port in places:
            if _is_taken(host, port):
                raise UserError(
                    f"port {port} of {what} is taken here{_by_whom(port)}: stop what listens there, or "
                    "write another port into the cluster file",
                    EXIT_ERROR,
                )

    def client(self, api: ApiConfig, key: str | None) -> Client:
        """See Machine."""
        return Client(ANY_ADDRESS.get(api.host, api.host), api.port, key)

    def placed(self, node: NodeConfig) -> Placed:
        """See Machine."""
        return Placed(node.rank, node.name)

    def mend(self) -> None:
        """It is never away."""

    def close(self) -> None:
        """Nothing to let go of."""


def _is_taken(host: str, port: int) -> bool:
    """Whether another process listens there. Other troubles with the address are run_node's to tell."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False


def _by_whom(port: int) -> str:
    """In words; nothing where the system does not tell (macOS tells root only)."""
    try:
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN and bool(connection.laddr)
            if is_listening and connection.laddr.port == port and connection.pid:  # type: ignore[union-attr]
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({command[:120]})"
    except (psutil.Error, OSError):
        pass
    return ""
