"""What `macrame up` remembers of a config between two runs, so that the next one, or `down`, finds its nodes.

One thread. The folder of a config is private to its user; the name holds a digest of the config's path.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config_security import file_stem
from cluster.console import as_word
from cluster.errors import EXIT_ERROR, UserError
from deploy.authority import authorities_folder
from shard_loader.whole_file import write_whole

POLL_S = 0.05
RECORD_NAME, LOCK_NAME = "up.json", "up.lock"


@dataclass(frozen=True, slots=True)
class Placed:
    """A node that was started, and where: here, or over ssh."""

    rank: int
    name: str
    destination: str | None = None  # what ssh takes; None: this machine
    home: dict[str, str] | None = None  # the fields of its RemoteHome


@dataclass(frozen=True, slots=True)
class Record:
    """The nodes that may run, of the last `up`."""

    nodes: tuple[Placed, ...] = ()
    ssh_options: tuple[str, ...] = ()


def cluster_name(config: Path) -> str:
    """The name of this config's folder, here and on other machines: of this machine and this path."""
    path = config.resolve()
    digest = hashlib.sha256(f"{socket.gethostname()}\0{path}".encode()).hexdigest()[:12]
    return f"{file_stem(path.stem)[:40]}-{digest}"


def cluster_folder(config: Path) -> Path:
    """Where this machine's files of the config's nodes are: beside the authorities, see there."""
    return authorities_folder().parent / "clusters" / cluster_name(config)


def read_record(folder: Path) -> Record:
    """Empty where there is none, or none that can be read."""
    try:
        content: Any = json.loads((folder / RECORD_NAME).read_bytes())
        nodes = tuple(Placed(**node) for node in content["nodes"])
        return Record(nodes, tuple(content["ssh_options"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Record()


def write_record(folder: Path, record: Record) -> None:
    """Raises UserError where it cannot be written; a record of no nodes is removed."""
    try:
        if not record.nodes:
            (folder / RECORD_NAME).unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(folder / RECORD_NAME, json.dumps(asdict(record), indent=2).encode(), 0o600)
    except OSError as error:
        raise UserError(f"{folder / RECORD_NAME} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def alone(folder: Path, config: Path, *, is_named: bool = True, patience_s: float = 0.0) -> Iterator[None]:
    """While the block runs, no other `up` or `down` of this config does. Raises UserError where one does.

    is_named: others must be able to tell which process it is; `down` does without where the disk is full.
    patience_s: so long one that is just ending is waited for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / LOCK_NAME).open("a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    with lock:
        deadline = time.monotonic() + patience_s
        while not (is_taken := _take(lock.fileno())) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not is_taken:
            raise UserError(
                f"macrame up of {config} runs already, as process {_holder(folder)}: press Ctrl-C there, or "
                f"run macrame down --config {as_word(config)}",
                EXIT_ERROR,
            )
        try:
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), str(os.getpid()).encode())
        except OSError as error:
            if is_named:
                raise UserError(f"{folder / LOCK_NAME} cannot be written: {error.strerror}") from None
        yield
        os.ftruncate(lock.fileno(), 0)


def running_up(folder: Path) -> int | None:
    """The process of an `up` that follows this config's nodes now, or None."""
    try:
        with (folder / LOCK_NAME).open("r") as lock:
            if _take(lock.fileno()):
                return None
    except OSError:
        return None
    return _holder(folder)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(folder: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / LOCK_NAME).read_text())
    return None
