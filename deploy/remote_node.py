"""One rank's `run_node` on another machine: a NodeHandle whose orders go over ssh to node_agent.py there.

The node lives on when the connection or this process ends, and the next handle finds it. One thread for each
Ssh at a time.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from cluster.config_security import file_stem
from cluster.errors import EXIT_ERROR, UserError
from deploy.node_handle import STOP_LIMIT_S, NoAnswerError, NodeProcess, files_digest
from deploy.remote_home import RemoteHome
from deploy.ssh import RUN_LIMIT_S, Ssh
from deploy.ssh_trouble import is_full, last_line


class RemoteNode:
    """A NodeHandle. cluster: a name for the folder of this config there; each rank has its own in it."""

    def __init__(self, ssh: Ssh, home: RemoteHome, cluster: str, rank: int) -> None:
        self._ssh, self._home, self.rank = ssh, home, rank
        self.folder = f"{home.root}/rings/{file_stem(cluster)}/rank-{rank}"
        self.version = home.version
        self._digest = ""

    def put_files(self, files: Mapping[str, tuple[bytes, int]]) -> bool:
        """See NodeHandle. Raises UserError for a full disk, and a name that leads out of the folder."""
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{name} is no file within a node's folder", EXIT_ERROR)
        sent = {name: (base64.b64encode(content).decode(), mode) for name, (content, mode) in files.items()}
        answer = self._ask("put_files", files=sent)
        self._digest = files_digest(files)
        return bool(answer["changed"])

    def start(self, arguments: Sequence[str] = (), environment: Mapping[str, str] = {}) -> None:
        """See NodeHandle."""
        self._ask("start", arguments=list(arguments), environment=dict(environment))

    def state(self) -> NodeProcess:
        """See NodeHandle."""
        answer = self._ask("state")
        return NodeProcess(**{**answer, "arguments": tuple(answer["arguments"])})

    def listeners(self, places: Sequence[tuple[str, int]]) -> list[str | None]:
        """See NodeHandle."""
        return list(self._ask("listeners", places=list(places))["who"])

    def tail(self, lines: int = 40) -> str:
        """See NodeHandle."""
        return str(self._ask("tail", lines=lines)["text"])

    def stop(self, timeout_s: float = STOP_LIMIT_S) -> str:
        """See NodeHandle."""
        return str(self._ask("stop", timeout_s=timeout_s, limit_s=RUN_LIMIT_S + timeout_s)["left"])

    def _ask(self, order: str, *, limit_s: float = RUN_LIMIT_S, **more: Any) -> dict[str, Any]:
        """What the agent there answers. Raises UserError for what it cannot do, NoAnswerError without one."""
        content = {
            "order": order,
            "folder": self.folder,
            "rank": self.rank,
            "version": self.version,
            "digest": self._digest,
            **more,
        }
        script = f"unset PYTHONPATH PYTHONHOME\nexec {shlex.quote(self._home.python)} -m deploy.node_agent"
        reply = self._ssh.run(script, data=json.dumps(content).encode(), timeout_s=limit_s)
        try:
            answer: dict[str, Any] = json.loads(reply.out)
        except ValueError:
            reason = last_line(reply.err) or f"exit code {reply.code}"
            raise NoAnswerError(
                f"macrame on {self._ssh.destination} does not run ({reason}): start again with 'macrame up', "
                "which installs it anew",
                EXIT_ERROR,
            ) from None
        if "error" in answer and is_full(answer["error"]):
            told = f"the disk of {self._ssh.destination} is full: make room there ({answer['error']})"
            raise UserError(told, int(answer["exit_code"]))
        if "error" in answer:
            raise UserError(f"{self._ssh.destination}: {answer['error']}", int(answer["exit_code"]))
        return answer
