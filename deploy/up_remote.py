"""A machine that `macrame up` reaches over ssh: carries a wheel of itself there, and nodes. One thread."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.config import ApiConfig, NodeConfig
from cluster.errors import EXIT_ERROR, UserError
from deploy.client import Client
from deploy.remote_home import RemoteHome, prepare
from deploy.remote_node import RemoteNode
from deploy.ssh import Ssh
from deploy.target import ANY_ADDRESS
from deploy.up_record import Placed
from deploy.wheel import own_wheel

CUDA_EXTRA = "cuda13"


class There:
    """A Machine."""

    may_stop_at_once = False
    poll_s = 2.0  # each look starts a process there

    def __init__(
        self,
        destination: str,
        *,
        cluster: str,
        wheels: Path,
        options: Sequence[str],
        find_links: Path | None,
        placed: Placed | None,
    ) -> None:
        self.name, self.destination = destination, destination
        self._ssh = Ssh(destination, options=options)
        self._cluster, self._wheels, self._find_links = cluster, wheels, find_links
        home = None if placed is None else placed.home
        self._home = None if home is None else RemoteHome(**home)
        self._handles: dict[int, RemoteNode] = {}
        self._api_port = 0
        self._may_be_here = True

    def connect(self) -> None:
        """See Machine."""
        self._ssh.connect()

    def prepare(self, nodes: Sequence[NodeConfig], show: Callable[[str], None]) -> None:
        """See Machine: a new environment there takes minutes, one of an earlier time none."""
        self._wheels.mkdir(parents=True, exist_ok=True)
        is_cuda = any((node.chip or "").upper().startswith("NVIDIA") for node in nodes)
        self._home = prepare(
            self._ssh,
            own_wheel(self._wheels),
            show=show,
            extra=CUDA_EXTRA if is_cuda else "",
            find_links=self._find_links,
        )
        self._handles.clear()
        # A way to the API at its own port is best, but not where that port must stay free for the API itself.
        self._may_be_here = self._ssh.run("uname -n").out.strip() == socket.gethostname()

    def handle(self, rank: int) -> RemoteNode:
        """See Machine."""
        if self._home is None:
            raise UserError(f"{self.name} was never prepared for nodes", EXIT_ERROR)
        if rank not in self._handles:
            self._handles[rank] = RemoteNode(self._ssh, self._home, self._cluster, rank)
        return self._handles[rank]

    def check_folders(self, folders: Sequence[Path]) -> None:
        """See Machine."""
        for folder in folders:
            if self._ssh.run(f"test -d {shlex.quote(str(folder))}").code != 0:
                raise UserError(
                    f"{folder} is a folder of this machine, and {self.name} has none there: copy it to the "
                    f"same place (rsync -a {folder}/ {self.name}:{folder}/), or name a hub id in the config",
                    EXIT_ERROR,
                )

    def client(self, api: ApiConfig, key: str | None) -> Client:
        """See Machine."""
        host = ANY_ADDRESS.get(api.host, api.host)
        wanted = 0 if self._may_be_here else api.port
        port = self._ssh.forward(host, api.port, local_port=self._api_port or wanted)
        self._api_port = port  # clients of this address go on after the connection was made anew
        return Client("127.0.0.1", port, key)

    def placed(self, node: NodeConfig) -> Placed:
        """See Machine."""
        home = None if self._home is None else asdict(self._home)
        return Placed(node.rank, node.name, self.destination, home)

    def mend(self) -> None:
        """See Machine."""
        self._ssh.close()
        self._ssh.connect()

    def close(self) -> None:
        """See Machine."""
        self._ssh.close()
