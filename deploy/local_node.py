"""One rank's `run_node` on this machine, which lives on when we end, and is found again. One thread."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import UserError
from cluster.versions import macrame_version
from deploy.node_handle import CONFIG_NAME, STOP_LIMIT_S, NodeProcess, files_digest
from deploy.taken_port import listener
from shard_loader.whole_file import write_whole

LOG_NAME, RECORD_NAME = "node.log", "started.json"
HANDED_NAME = "files.json"  # the names of the files that put_files wrote
POLL_S = 0.05
TRACE_S = 0.3  # for a node to write where its threads are
MAX_TAIL_BYTES = 256 << 10
NODE_PACKAGES = ("cluster", "shard_loader", "planner", "kernels", "proto")


class LocalNode:
    """A NodeHandle. The node's files, log and record are in `folder`, which nobody else can read."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.version = own_version()
        self._digest = ""
        self._child: subprocess.Popen[bytes] | None = None  # None: an earlier `up` started it, or nobody

    @property
    def log(self) -> Path:
        """Where its output goes; that of the process before is beside it, with .1 at the end."""
        return self.folder / LOG_NAME

    def put_files(self, files: Mapping[str, tuple[bytes, int]]) -> bool:
        """See NodeHandle. Raises UserError where they cannot be written."""
        self._digest = files_digest(files)
        handed = self._handed()
        stale = handed - set(files)
        for name in stale:
            self._remove(name)
        if handed != set(files):  # before they are written: what is never written is no harm
            self._write(self.folder / HANDED_NAME, json.dumps(sorted(files)).encode(), 0o600)
        changed = [name for name, (content, mode) in files.items() if not self._has(name, content, mode)]
        for name in changed:
            content, mode = files[name]
            self._write(self.folder / name, content, mode)
        return bool(changed or stale)

    def start(self, arguments: Sequence[str] = (), environment: Mapping[str, str] = {}) -> None:
        """See NodeHandle. In a session of its own, so that a terminal's Ctrl-C reaches us first."""
        command = [sys.executable, "-m", "cluster.run_node", "--rank", str(self.rank), *arguments]
        command += ["--config", str(self._config)]
        try:
            if self.log.exists():
                self.log.replace(self.log.with_name(f"{LOG_NAME}.1"))
            with self.log.open("wb") as log:
                self._child = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                )
        except OSError as error:
            raise UserError(f"{self.log} cannot be written: {error.strerror}") from None
        record = {
            "pid": self._child.pid,
            "started_at_s": time.time(),
            "files_digest": self._digest,
            "version": self.version,
            "arguments": list(arguments),
        }
        self._write(self.folder / RECORD_NAME, json.dumps(record).encode(), 0o600)

    def state(self) -> NodeProcess:
        """See NodeHandle. A node without a record, as after a start that was cut short, is looked for."""
        record = self._record()
        child = self._child
        code = child.poll() if child is not None else None
        if child is not None and child.pid == record.get("pid"):
            pid = child.pid if code is None else None
        else:
            pid = self._own(record.get("pid")) or self._found()
        is_recorded = pid is None or pid == record.get("pid")
        return NodeProcess(
            pid=pid,
            started_at_s=record.get("started_at_s") if is_recorded else None,
            exit_code=code,
            files_digest=str(record.get("files_digest", "")) if is_recorded else "",
            version=str(record.get("version", "")) if is_recorded else "",
            arguments=tuple(record.get("arguments", ())) if is_recorded else (),
        )

    def listeners(self, places: Sequence[tuple[str, int]]) -> list[str | None]:
        """See NodeHandle."""
        return [listener(host, port) for host, port in places]

    def tail(self, lines: int = 40) -> str:
        """See NodeHandle."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - MAX_TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, timeout_s: float = STOP_LIMIT_S) -> str:
        """See NodeHandle. The head's HTTP process ends with it."""
        pid = self.state().pid
        left = "" if pid is None else self._end(pid, timeout_s)
        (self.folder / RECORD_NAME).unlink(missing_ok=True)
        self._child = None
        return left

    def _end(self, pid: int, timeout_s: float) -> str:
        family = _family(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while any(left := [member for member in family if self._lives(member)]):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if not left:
            return ""
        told = f"{', '.join(map(_named, left))} did not end within {timeout_s:.0f} s and was killed"
        if any(member.pid == pid for member in left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # run_node writes where its threads are
            time.sleep(TRACE_S)
            told += f"; the end of its log:\n{self.tail()}"
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                member.wait(TRACE_S)
        return told

    def _lives(self, member: psutil.Process) -> bool:
        if self._child is not None and member.pid == self._child.pid:
            return self._child.poll() is None  # reaps it; a zombie of ours may still have threads
        try:
            return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def _config(self) -> Path:
        return self.folder / CONFIG_NAME

    def _record(self) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / RECORD_NAME).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _handed(self) -> set[str]:
        try:
            return set(map(str, json.loads((self.folder / HANDED_NAME).read_bytes())))
        except (OSError, ValueError, TypeError):
            return set()

    def _own(self, pid: object) -> int | None:
        """`pid` if that is our node: numbers of processes are used again, the path of its config is not."""
        if not isinstance(pid, int):
            return None
        try:
            command = psutil.Process(pid).cmdline()
        except psutil.Error:
            return None
        return pid if self._is_ours(command) else None

    def _found(self) -> int | None:
        for process in psutil.process_iter(["cmdline"]):
            if self._is_ours(process.info["cmdline"] or []):
                return int(process.pid)
        return None

    def _is_ours(self, command: list[str]) -> bool:
        return "cluster.run_node" in command and str(self._config) in command

    def _has(self, name: str, content: bytes, mode: int) -> bool:
        path = self.folder / name
        try:
            return path.stat().st_mode & 0o777 == mode and path.read_bytes() == content
        except OSError:
            return False

    def _remove(self, name: str) -> None:
        path = self.folder / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be removed: {error.strerror}") from None
        if path.parent != self.folder:
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # where nothing is left in it

    def _write(self, path: Path, content: bytes, mode: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(path, content, mode)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None


@cache
def own_version() -> str:
    """Of the code that a node started now would run: an edited checkout is another version."""
    root, total = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for package in NODE_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            total.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return f"{macrame_version()}+{total.hexdigest()[:8]}"


def _family(pid: int) -> list[psutil.Process]:
    try:
        node = psutil.Process(pid)
        return [node, *node.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _named(member: psutil.Process) -> str:
    try:
        return f"process {member.pid} ({' '.join(member.cmdline()[1:5])})"
    except psutil.Error:
        return f"process {member.pid}"
