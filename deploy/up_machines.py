"""The machines of a config as `macrame up` sees them: this one, and those that it reaches over ssh.

Each machine belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cluster.config import ApiConfig, NodeConfig
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
