"""Real run_node processes on loopback for whole-ring tests: start, wait, break, restart, stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import grpc

from proto import control_pb2, control_pb2_grpc, head_pb2, head_pb2_grpc, ring_pb2
from tests.waiting import PATIENT_S


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


NO_GUESSES = {"method": "off"}  # as `speculation`: each frame of an answer carries one token
HUNG = 1000  # added to the exit code of a node that had to be killed


class RingProcesses:
    """A cluster of `len(layers)` nodes on this machine; rank i owns layers[i], or none where it is None."""

    def __init__(
        self,
        directory: Path,
        model: Path | str,
        layers: Sequence[tuple[int, int] | None],
        *,
        concurrency: int = 4,
        context: int = 512,
        queue: int = 64,
        faults: Mapping[int, str] | None = None,
        with_api: bool = False,
        log_is_closed: bool = False,
        env: Mapping[str, str | None] | None = None,
        env_of: Mapping[int, Mapping[str, str | None]] | None = None,
        memory_gb: float = 16,
        chip: str | None = None,
        devices: Sequence[str | None] | None = None,
        silence_timeout_s: float = PATIENT_S,
        **config: Any,
    ) -> None:
        *ports, api_port = free_ports(len(layers) + 1)
        self.ports, self.api_port = ports, api_port
        self.directory, self.with_api = directory, with_api
        self.log_is_closed = log_is_closed  # standard error is a pipe that nobody reads
        self.faults = dict(faults or {})
        self.env = dict(env or {})
        self.env_of = dict(env_of or {})
        nodes = []
        for rank, (port, owned) in enumerate(zip(ports, layers, strict=True)):
            node: dict[str, Any] = {
                "name": f"n{rank}",
                "host": "127.0.0.1",
                "port": port,
                "memory_gb": memory_gb,
                "chip": chip,
            }
            if owned is not None:
                node["layers"] = f"{owned[0]}:{owned[1]}"
            nodes.append(node)
        self.config_path = directory / "cluster.json"
        self.config = {
            "model": str(model),
            "context": context,
            "concurrency": concurrency,
            "nodes": nodes,
            "api": {"host": "127.0.0.1", "port": api_port, "queue": queue},
            "silence_timeout_s": silence_timeout_s,
            **config,
        }
        self.config_path.write_text(json.dumps(self.config))
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self._ready: dict[int, threading.Event] = {}
        self._readers: list[threading.Thread] = []

    # -- life ---------------------------------------------------------------------------------------------
    def __enter__(self) -> RingProcesses:
        for rank in range(len(self.ports)):
            self.start(rank)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        codes = self.stop()
        if error is not None:
            for rank in self.processes:
                error.add_note(f"log of rank {rank}: {self.log(rank)[-2000:]}")
        else:
            bad = {rank: code for rank, code in codes.items() if code not in (0, -signal.SIGKILL)}
            assert not bad, f"exit codes {bad}; logs: {self.log(next(iter(bad)))}"

    def start(self, rank: int, *arguments: str) -> None:
        """Start one node and return at once."""
        wanted = {**os.environ, "MLX_DISABLE_COMPILE": "1", **self.env, **self.env_of.get(rank, {})}
        environment = {key: value for key, value in wanted.items() if value is not None}
        if rank in self.faults:
            environment["MACRAME_FAULT"] = self.faults[rank]
        command = [
            sys.executable,
            "-m",
            "cluster.run_node",
            "--rank",
            str(rank),
            "--config",
            str(self.config_path),
        ]
        if not self.with_api:
            command.append("--no-api")
        with self._open_log(rank) as log:
            process = subprocess.Popen(
                [*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        ready = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if line.startswith("NODE_READY"):
                        ready.set()

        reader = threading.Thread(target=read, name=f"stdout-{rank}")
        reader.start()
        self._readers.append(reader)
        self.processes[rank], self._ready[rank] = process, ready

    def _open_log(self, rank: int) -> IO[str]:
        if not self.log_is_closed:
            return (self.directory / f"node{rank}.log").open("a")
        reader, writer = os.pipe()
        os.close(reader)
        return os.fdopen(writer, "w")

    def wait_listening(self, rank: int, timeout_s: float = 90.0) -> None:
        """Until the node's gRPC port is bound."""
        assert self._ready[rank].wait(timeout_s), self.log(rank)

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        self.processes[rank].kill()
        self.processes[rank].wait()

    def pause(self, rank: int) -> None:
        """SIGSTOP."""
        self.processes[rank].send_signal(signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """SIGCONT."""
        self.processes[rank].send_signal(signal.SIGCONT)

    def stop(self) -> dict[int, int]:
        """SIGTERM to all; exit codes by rank. One that does not end within 10 s is killed."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        codes = {}
        for rank, process in self.processes.items():
            try:
                codes[rank] = process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGUSR1)  # its stacks go to its log
                threading.Event().wait(0.5)
                process.kill()
                codes[rank] = HUNG + process.wait()
        for reader in self._readers:
            reader.join(5.0)
        return codes

    def log(self, rank: int) -> str:
        """What the node wrote to stderr."""
        return (self.directory / f"node{rank}.log").read_text()

    # -- asking -------------------------------------------------------------------------------------------
    @contextmanager
    def channel(self, rank: int = 0) -> Iterator[grpc.Channel]:
        """A plain channel to a node."""
        with grpc.insecure_channel(f"127.0.0.1:{self.ports[rank]}") as channel:
            yield channel

    def wait_status(
        self, test: Callable[[head_pb2.ClusterStatus], bool], timeout_s: float = 60.0
    ) -> head_pb2.ClusterStatus:
        """The first cluster status that passes, from the head's own stream."""
        deadline = time.monotonic() + timeout_s
        self.wait_listening(0)
        last = None
        with self.channel() as channel:
            call = head_pb2_grpc.HeadStub(channel).WatchCluster(
                head_pb2.ClusterRequest(), wait_for_ready=True
            )
            for last in call:
                if test(last):
                    call.cancel()
                    return last
                if time.monotonic() > deadline:
                    call.cancel()
                    break
        raise AssertionError(f"not reached within {timeout_s} s; last status {last}; head log {self.log(0)}")

    def wait_ok(self, timeout_s: float = 60.0) -> head_pb2.ClusterStatus:
        """Until the ring serves."""
        return self.wait_status(lambda status: status.status == "ok", timeout_s)

    def wait_api(self, timeout_s: float = 60.0) -> str:
        """Until /health is 200; the base URL."""
        url = f"http://127.0.0.1:{self.api_port}"
        self.wait_ok(timeout_s)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2.0):
                    return url
            except OSError:
                threading.Event().wait(0.05)
        raise AssertionError(f"{url}/health is not ok within {timeout_s} s; head log {self.log(0)}")

    def node_status(self, rank: int) -> control_pb2.NodeStatus:
        """The node's own word."""
        with self.channel(rank) as channel:
            return control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20.0)

    def generate(
        self, prompt: Sequence[int], max_tokens: int, *, adapter: str = "", **sampling: Any
    ) -> list[head_pb2.GenerateReply]:
        """All replies of one request to the head, greedy unless told otherwise."""
        with self.channel() as channel:
            return list(
                head_pb2_grpc.HeadStub(channel).Generate(
                    head_pb2.GenerateRequest(
                        prompt=prompt,
                        max_tokens=max_tokens,
                        sampling=ring_pb2.Sampling(**sampling),
                        adapter=adapter,
                    ),
                    timeout=120.0,
                )
            )

    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The greedy tokens of many requests at once, over one stream as the HTTP process has it."""
        asks = [
            head_pb2.Ask(
                generate=head_pb2.GenerateRequest(
                    request_id=f"many-{i}", prompt=prompt, max_tokens=max_tokens
                )
            )
            for i, prompt in enumerate(prompts)
        ]
        told: dict[str, list[int]] = {ask.generate.request_id: [] for ask in asks}
        is_done, num_ended = threading.Event(), 0

        def talk() -> Iterator[head_pb2.Ask]:
            yield from asks
            is_done.wait()

        with self.channel() as channel:
            for message in head_pb2_grpc.HeadStub(channel).Converse(talk(), timeout=600.0):
                for answer in message.answers:
                    assert not answer.code, answer.message
                    told[answer.request_id] += (token.id for token in answer.reply.tokens)
                    num_ended += bool(answer.reply.finish_reason)
                if num_ended == len(asks):
                    break
            is_done.set()
        return list(told.values())

    def tokens(self, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> list[int]:
        """The token ids of one answer."""
        return [t.id for reply in self.generate(prompt, max_tokens, **sampling) for t in reply.tokens]
