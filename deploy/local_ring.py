"""A whole ring on this machine: one `run_node` process per rank, each with a log file. One thread only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.errors import EXIT_ERROR, UserError

POLL_S = 0.05
TAIL_LINES = 40
SENTENCE = "run_node: "  # so begins what a node says when it ends by itself
TRACE_S = 0.3


class LocalRing:
    """The processes of a config's ranks. `stop()` ends all of them, whatever happened before."""

    def __init__(self, config: Path, ranks: Sequence[int], log_dir: Path) -> None:
        self._config, self._ranks, self._log_dir = config, ranks, log_dir
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts every rank; in sessions of their own, so that Ctrl-C reaches us first."""
        for rank in self._ranks:
            command = [
                *(sys.executable, "-m", "cluster.run_node"),
                *("--rank", str(rank), "--config", str(self._config)),
            ]
            with self.log(rank).open("wb") as log:
                self._processes[rank] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )

    def log(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self._log_dir / f"node-{rank}.log"

    def pids(self) -> dict[int, int]:
        """Rank to process id."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def cpu_s(self) -> float:
        """User and system time of all processes so far, the HTTP process included."""
        total_s = 0.0
        for member in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                total_s += times.user + times.system
        return total_s

    def check(self) -> None:
        """Raises UserError if a node has ended, with its last sentence or the end of its log.

        Its own exit code goes on.
        """
        for rank, process in self._processes.items():
            code = process.poll()
            if code is not None:
                ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                why = self._last_words(rank)
                told = f"node {rank}: {why}" if len(self._ranks) > 1 else why
                raise UserError(
                    told if why else f"node {rank} {ended}; the end of its log:\n{self.tail(rank)}",
                    code if code > 0 else EXIT_ERROR,
                )

    def _last_words(self, rank: int) -> str:
        """The sentence with which `run_node` ended by itself, or nothing."""
        last = self.tail(rank).splitlines()[-1].strip()
        return last.removeprefix(SENTENCE) if last.startswith(SENTENCE) else ""

    def tail(self, rank: int) -> str:
        """The last lines of a rank's log, indented."""
        try:
            lines = self.log(rank).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:] or ["(empty)"])

    def stop(self, timeout_s: float) -> list[str]:
        """SIGTERM to all, SIGKILL after `timeout_s`; says in words what did not end by itself."""
        family = self._family()
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            # A process whose first thread has ended looks like a zombie while its other threads still end:
            # only its exit code says that it is gone. Every one is asked, which reaps it.
            codes = [process.poll() for process in self._processes.values()]
            if None not in codes and not any(map(_lives, family)):
                break
            time.sleep(POLL_S)
        left = [member for member in family if _lives(member)]
        told = list(map(_named, left))
        for rank, process in self._processes.items():
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)  # run_node writes where its threads are
                time.sleep(TRACE_S)
                told.append(f"the end of the log of node {rank}:\n{self.tail(rank)}")
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self._processes.values():
            process.wait()
        return told

    def _family(self) -> list[psutil.Process]:
        """Our processes and their children: the HTTP process belongs to rank 0."""
        family = []
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                node = psutil.Process(process.pid)
                family += [node, *node.children(recursive=True)]
        return family


def _lives(member: psutil.Process) -> bool:
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _named(member: psutil.Process) -> str:
    try:
        return f"process {member.pid} ({' '.join(member.cmdline()[1:5])})"
    except psutil.NoSuchProcess:
        return f"process {member.pid}"


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    return why_not_free(host, port) is None


def why_not_free(host: str, port: int) -> OSError | None:
    """What the system says to a server that would listen there; None where it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
        return None


def free_ports(host: str, count: int) -> list[int]:
    """So many different ports on which nothing listens now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
