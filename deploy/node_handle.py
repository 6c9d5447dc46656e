"""What `macrame up` needs of one node's process, on whichever machine. Pure; one thread per handle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import UserError

CONFIG_NAME = "cluster.json"  # among a node's files: what run_node --config is given
CERTIFICATES = "certs/"  # files below it may change under a running node, which takes them by itself
STOP_LIMIT_S = 10.0


class NoAnswerError(UserError):
    """An order to another machine was not answered, though the machine is there: the next may be."""


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """A node's process as it is now; the defaults are those of one that was never started."""

    pid: int | None = None  # None: it does not run
    started_at_s: float | None = None  # Unix time, by the clock there; None: never, or nobody knows
    exit_code: int | None = None  # of one that ended, negative for a signal; None: it runs, or nobody knows
    files_digest: str = ""  # of the files it was started with; empty: nobody knows
    version: str = ""  # of the macrame it was started with; empty: nobody knows
    arguments: tuple[str, ...] = ()  # those of `start`

    @property
    def is_running(self) -> bool:
        return self.pid is not None


class NodeHandle(Protocol):
    """One rank's `run_node`, which lives on when its handle, or `up`, is gone.

    Every method raises UserError: exit code 4 where the machine cannot be reached.
    """

    @property
    def version(self) -> str:
        """Of the macrame that `start` would start, comparable with NodeProcess.version."""

    def put_files(self, files: Mapping[str, tuple[bytes, int]]) -> bool:
        """Relative name -> (content, mode), all files of the node; True: something was different there.

        Those of an earlier call that are no more among them are removed.
        """

    def start(self, arguments: Sequence[str] = (), environment: Mapping[str, str] = {}) -> None:
        """Starts `run_node --rank N ARGUMENTS --config cluster.json` and records for `state` what with:
        `files_digest` of the last put_files, the arguments and the version. Its output goes to a log that
        begins anew.
        """

    def state(self) -> NodeProcess:
        """How the process stands, whoever started it from these files."""

    def listeners(self, places: Sequence[tuple[str, int]]) -> list[str | None]:
        """Who listens on each host and port there: see deploy.taken_port.listener."""

    def tail(self, lines: int = 40) -> str:
        """The last lines of its log, without indentation."""

    def stop(self, timeout_s: float = STOP_LIMIT_S) -> str:
        """SIGTERM, then SIGKILL; says in words what did not end by itself, empty where it did or was gone."""


def files_digest(files: Mapping[str, tuple[bytes, int]]) -> str:
    """16 hex digits of the names and contents that a node reads only once, at its start: not certificates."""
    total = hashlib.sha256()
    for name in sorted(files):
        if not name.startswith(CERTIFICATES):
            total.update(f"{name}\0{hashlib.sha256(files[name][0]).hexdigest()}\n".encode())
    return total.hexdigest()[:16]
