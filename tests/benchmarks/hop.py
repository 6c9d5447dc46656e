"""One hop of a token's hidden state (8 KiB of bf16) over an edge, against blocking TCP in the same run.

    python tests/benchmarks/hop.py [--count 3000] [--pause-ms 0] [--tls] [--bytes 8192]

Two processes on loopback, pinned to different cores where the system can. A hop goes from send() with the
tensor's bytes to the decoded frame in on_frame; the other process sends it back, and one way is half of the
round trip. --tls measures an edge over mutual TLS besides, in turns with the plain one, each time with a new
process on the other side. With --pause-ms the ring rests before each round trip, as it does while stages
compute. CPU is that of both processes.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.config_security import TlsFiles
from cluster.ring import EdgeSender, EdgeService, IncomingFrame
from cluster.rpc import make_server
from cluster.tls import Credentials, Tls
from proto import ring_pb2
from proto.codec import Tensor
from tests.certificates import Cluster

HOST = "127.0.0.1"
PAYLOAD_BYTES = 8192
NUM_ROUNDS = 10
NUM_TURNS = 6  # of each kind of edge, where two are compared
NUM_WARMUP = 200
GOAL = 2.6


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(core: int) -> None:
    if CORES:
        os.sched_setaffinity(0, {CORES[core % len(CORES)]})


def unpin() -> None:
    """A new process begins with what its parent has."""
    if CORES:
        os.sched_setaffinity(0, CORES)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ignore(*_args: object) -> None:
    """A callback that nothing follows from."""


class Node:
    """A server for frames and, once the other's port is known, an edge to it."""

    def __init__(self, rank: int, tls: Tls | None = None) -> None:
        self.credentials = Credentials("token", tls)
        self.rank = rank
        self.frames: SimpleQueue[IncomingFrame] = SimpleQueue()
        self.on_frame = self.frames.put
        self.service = EdgeService(
            accept=lambda _hello: None,
            on_frame=self._take,
            on_edge_down=ignore,
            beat=ring_pb2.Beat,
            incarnation=1,
        )
        self.server, self.port = make_server(
            f"{HOST}:0", [self.service.add_to], self.credentials, max_workers=4
        )
        self.server.start()

    def _take(self, incoming: IncomingFrame) -> None:
        self.on_frame(incoming)

    def connect(self, port: int) -> EdgeSender:
        up: SimpleQueue[None] = SimpleQueue()
        hello = ring_pb2.Hello(epoch=1, from_rank=self.rank, to_rank=1 - self.rank)
        sender = EdgeSender(
            f"{HOST}:{port}",
            self.credentials,
            hello,
            peer=f"n{1 - self.rank}",
            on_up=lambda: up.put(None),
            on_down=ignore,
            on_refused=ignore,
            beat=ring_pb2.Beat,
        )
        up.get(timeout=10)
        return sender

    def close(self, sender: EdgeSender) -> None:
        sender.close()
        self.service.close()
        self.server.stop(None).wait(1.0)


def connect_tcp(port: int) -> socket.socket:
    stream = socket.create_connection((HOST, port))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def receive_exactly(stream: socket.socket, buffer: memoryview) -> bool:
    got = 0
    while got < len(buffer):
        count = stream.recv_into(buffer[got:])
        if count == 0:
            return False
        got += count
    return True


def certificate(folder: Path, rank: int) -> Tls:
    return Tls(TlsFiles(f"n{rank}", folder / "ca.pem", folder / f"n{rank}.pem", folder / f"n{rank}.key"))


def run_peer(port: int, tcp_port: int, payload_bytes: int, tls: Tls | None) -> None:
    """The other process: echoes frames where they come in, and TCP on its main thread."""
    pin(1)
    node = Node(1, tls)
    print(node.port, flush=True)
    sender = node.connect(port)

    def echo(incoming: IncomingFrame) -> None:
        sender.send(incoming.frame, incoming.tensors)
        incoming.consume()

    node.on_frame = echo
    stream = connect_tcp(tcp_port)
    print("ready", flush=True)
    buffer = memoryview(bytearray(payload_bytes))
    for line in sys.stdin:
        if line == "tcp\n":
            for _ in range(int(sys.stdin.readline())):
                receive_exactly(stream, buffer)
                stream.sendall(buffer)
        print(cpu_s(), flush=True)
    node.close(sender)


class Bench:
    """This process's side."""

    def __init__(self, pause_s: float, payload_bytes: int, folder: Path | None) -> None:
        unpin()
        self.pause_s, self.payload_bytes = pause_s, payload_bytes
        self.node = Node(0, None if folder is None else certificate(folder, 0))
        with socket.create_server((HOST, 0)) as listener:
            port = listener.getsockname()[1]
            given = [
                str(self.node.port),
                str(port),
                str(payload_bytes),
                *([] if folder is None else [folder]),
            ]
            self.peer = subprocess.Popen(
                [sys.executable, __file__, "--peer", *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            pin(0)
            self.sender = self.node.connect(int(self._read_line()))
            self.stream, _address = listener.accept()
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read_line()
        self.tensor = Tensor("bfloat16", (1, 1, payload_bytes // 2), os.urandom(payload_bytes))

    def _read_line(self) -> str:
        assert self.peer.stdout is not None
        return self.peer.stdout.readline()

    def ask(self, line: str) -> float:
        assert self.peer.stdin is not None
        self.peer.stdin.write(line)
        self.peer.stdin.flush()
        return float(self._read_line()) if not line.startswith("tcp") else 0.0

    def tcp(self, count: int) -> list[float]:
        """One way seconds of each round trip."""
        self.ask(f"tcp\n{count}\n")
        buffer = memoryview(bytearray(self.payload_bytes))
        times = []
        for _ in range(count):
            time.sleep(self.pause_s)
            begin = time.perf_counter()
            self.stream.sendall(self.tensor.data)
            receive_exactly(self.stream, buffer)
            times.append((time.perf_counter() - begin) / 2)
        self._read_line()
        return times

    def edge(self, count: int) -> list[float]:
        """One way seconds of each round trip; without pauses on_frame itself begins the next one."""
        times: list[float] = []
        done: SimpleQueue[None] = SimpleQueue()
        begin = 0.0

        def send() -> None:
            nonlocal begin
            begin = time.perf_counter()
            frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=len(times))
            frame.slots.add(session=1, position=len(times), tokens=(7,), num_tensors=1, is_sampled=True)
            self.sender.send(frame, (self.tensor,))

        def on_frame(incoming: IncomingFrame) -> None:
            times.append((time.perf_counter() - begin) / 2)
            incoming.consume()
            if self.pause_s or len(times) == count:
                done.put(None)
            else:
                send()

        self.node.on_frame = on_frame
        for _ in range(count if self.pause_s else 1):
            time.sleep(self.pause_s)
            send()
            done.get(timeout=60)
        return times

    def close(self) -> None:
        self.node.close(self.sender)
        self.stream.close()
        self.peer.communicate(timeout=5)


@dataclass(slots=True)
class Measured:
    """One way times, and the processor time of both processes."""

    times_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0


def show(name: str, found: Measured) -> float:
    """Prints one line; returns the median in us."""
    ordered = sorted(found.times_s)
    p50, p99 = (ordered[int(len(ordered) * q)] * 1e6 for q in (0.5, 0.99))
    cpu_us = found.cpu_s / (2 * len(ordered)) * 1e6
    print(f"{name:15} p50 {p50:7.1f} us   p99 {p99:7.1f} us   CPU {cpu_us:6.1f} us a hop")
    return p50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000, help="round trips of each kind")
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--tls", action="store_true", help="an edge over mutual TLS too")
    parser.add_argument("--bytes", type=int, default=PAYLOAD_BYTES, help="of the tensor, an even number")
    parser.add_argument("--peer", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        port, tcp_port, payload_bytes, *folder = args.peer
        tls = certificate(Path(folder[0]), 1) if folder else None
        run_peer(int(port), int(tcp_port), int(payload_bytes), tls)
        return
    found = {name: Measured() for name in ("blocking TCP", "edge", "edge over mTLS")}
    with tempfile.TemporaryDirectory() as made:
        cluster = Cluster(Path(made))
        cluster.node("n0")
        cluster.node("n1")
        kinds = [("edge", None), ("edge over mTLS", cluster.folder)] if args.tls else [("edge", None)]
        num_turns = NUM_TURNS if args.tls else 1
        for _ in range(num_turns):
            for name, folder in kinds:
                bench = Bench(args.pause_ms / 1e3, args.bytes, folder)
                try:
                    measure(bench, args.count // num_turns, found["blocking TCP"], found[name])
                finally:
                    bench.close()
            kinds.reverse()
    p50 = {name: show(name, one) for name, one in found.items() if one.times_s}
    print(f"ratio of p50: {p50['edge'] / p50['blocking TCP']:.2f} (goal {GOAL})")
    if args.tls:
        more = p50["edge over mTLS"] - p50["edge"]
        print(f"mutual TLS: {p50['edge over mTLS'] / p50['edge']:.2f} x the plain edge, {more:+.1f} us a hop")


def measure(bench: Bench, count: int, tcp: Measured, edge: Measured) -> None:
    bench.tcp(NUM_WARMUP)
    bench.edge(NUM_WARMUP)
    for _ in range(NUM_ROUNDS):
        for found, run in ((tcp, bench.tcp), (edge, bench.edge)):
            before = cpu_s() + bench.ask("cpu\n")
            found.times_s += run(count // NUM_ROUNDS)
            found.cpu_s += cpu_s() + bench.ask("cpu\n") - before


if __name__ == "__main__":
    main()
