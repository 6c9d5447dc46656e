"""What a node's service is, whichever system runs it: values, and what installing it would do. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
NAME_RULE = "must be lower-case letters, digits and hyphens, at most 32, as in node0"
WIRED_LIMIT = "wired-limit"  # the name of the other service, which is no node's
SEARCHED = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PRIVILEGED_PORTS = 1024
RESTART_S = 5  # after a node has ended; a restart that fails again and again costs a line of log each time
STOP_S = 10  # run_node ends within 2 s of SIGTERM
MAX_OPEN_FILES = 65536  # streams, clients and weight files; launchd alone would allow 256


@dataclass(frozen=True, slots=True)
class Account:
    """The user that a node runs as."""

    name: str
    home: Path
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class NodeService:
    """One rank of one cluster file as a service. Raises ValueError for what no unit file can say."""

    name: str
    rank: int
    config: Path
    account: Account
    python: Path
    arguments: tuple[str, ...] = ()  # of run_node, besides rank and config
    environment: Mapping[str, str] = field(default_factory=dict)
    writes: tuple[Path, ...] = ()  # folders that the node writes to, of the user
    binds_privileged_port: bool = False
    has_gpu: bool = False
    nvidia_modprobe: Path | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name == WIRED_LIMIT:
            raise ValueError(f"the name {self.name!r} {NAME_RULE}")
        texts = [*self.command, str(self.account.home), *map(str, self.writes), *self.environment.values()]
        for text in [*texts, *self.environment]:
            if not text.isprintable():
                raise ValueError(f"{text!r} has a character that a service file cannot have")

    @property
    def command(self) -> tuple[str, ...]:
        """What is run. PYTHONSAFEPATH keeps the working folder out of its imports."""
        node = ("--rank", str(self.rank), "--config", str(self.config))
        return (str(self.python), "-m", "cluster.run_node", *node, *self.arguments)

    @property
    def full_environment(self) -> dict[str, str]:
        """All that the process finds in its environment; launchd and systemd give it little else."""
        own = {
            "HOME": str(self.account.home),
            "LOGNAME": self.account.name,
            "PATH": SEARCHED,
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "USER": self.account.name,
        }
        return own | dict(self.environment)


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A file that installing writes; `account` owns it where one is given, else root."""

    path: Path
    content: str
    mode: int = 0o644
    account: Account | None = None
    is_kept: bool = False  # where it exists, its content stays


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that installing makes where it is missing."""

    path: Path
    account: Account | None = None
    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the system. `may_fail`: it undoes what may not be there."""

    words: tuple[str, ...]
    may_fail: bool = False
    retry_s: float = 0.0  # how long it is tried again


@dataclass(frozen=True, slots=True)
class Installation:
    """Everything that installing does, in order: folders, files, commands."""

    folders: tuple[Folder, ...]
    files: tuple[UnitFile, ...]
    start: tuple[Command, ...]
    notes: tuple[str, ...] = ()  # for the user: where its logs are, how it is stopped


@dataclass(frozen=True, slots=True)
class Removal:
    """Everything that removing does, in order."""

    stop: tuple[Command, ...]
    files: tuple[Path, ...]
    after: tuple[Command, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A service of ours that is installed; for the wired limit all but name and file are None."""

    name: str
    file: Path
    rank: int | None = None
    config: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What the system says of a service. None: it does not say."""

    word: str  # "running", or what it is instead, in the system's words
    is_well: bool
    pid: int | None = None
    last_exit: int | None = None
    num_starts: int | None = None


class Manager(Protocol):
    """What a system that runs services is asked; deploy/service_launchd.py and deploy/service_systemd.py."""

    FOLDER: Path  # of the files that it reads
    PATTERN: str  # of ours among them

    def why_not_here(self) -> str | None: ...
    def node_installation(self, service: NodeService) -> Installation: ...
    def removal(self, name: str) -> Removal: ...
    def read_installed(self, path: Path, content: bytes) -> Found | None: ...
    def state_command(self, name: str) -> tuple[str, ...]: ...
    def read_state(self, name: str, code: int, text: str) -> State: ...
