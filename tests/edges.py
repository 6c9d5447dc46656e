"""Ends of edges over real gRPC for tests: each with queues of what it reports, or written by hand.

Callers' threads; a Receiver's and a Sender's callbacks only put into queues.
"""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from cluster.edge_sender import EDGE_METHOD
from cluster.peer_links import Place
from cluster.ring import PROTOCOL, EdgeSender, EdgeService, IncomingFrame
from cluster.rpc import make_server, token_metadata
from cluster.tls import Credentials
from proto import ring_pb2
from proto.codec import Tensor

ROOT = Path(__file__).resolve().parent.parent

TOKEN = "token"

WAIT_S = 10.0


class Receiver:
    """An EdgeService with its server, and queues of what it reports."""

    def __init__(
        self,
        credentials: Credentials | str = TOKEN,
        accept: Callable[[ring_pb2.Hello], str | None] = lambda _hello: None,
        port: int = 0,
        **options: int,
    ) -> None:
        self.frames: SimpleQueue[IncomingFrame] = SimpleQueue()
        self.downs: SimpleQueue[tuple[ring_pb2.Hello, str]] = SimpleQueue()
        self.beats: SimpleQueue[ring_pb2.Beat] = SimpleQueue()
        self.service = EdgeService(
            accept=accept,
            on_frame=self.frames.put,
            on_edge_down=lambda hello, reason: self.downs.put((hello, reason)),
            beat=lambda: ring_pb2.Beat(progress=11, activity="computing"),
            on_beat=lambda _hello, beat: self.beats.put(beat),
            incarnation=5,
            **options,
        )
        place = f"127.0.0.1:{port}"
        self.server, self.port = make_server(place, [self.service.add_to], credentials, max_workers=8)
        self.server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self.service.close()
        assert self.server.stop(0).wait(10.0)


class Sender:
    """An EdgeSender and queues of what it reports."""

    def __init__(
        self,
        address: str,
        token: str | None = TOKEN,
        epoch: int = 3,
        from_rank: int = 1,
        places: Sequence[str] = (),
    ) -> None:
        self.ups: SimpleQueue[float] = SimpleQueue()
        self.downs: SimpleQueue[str] = SimpleQueue()
        self.refusals: SimpleQueue[str] = SimpleQueue()
        self.beats: SimpleQueue[ring_pb2.Beat] = SimpleQueue()
        self.edge = EdgeSender(
            address,
            token,
            ring_pb2.Hello(epoch=epoch, from_rank=from_rank, to_rank=2, config_digest="c"),
            on_up=lambda: self.ups.put(time.monotonic()),
            on_down=self.downs.put,
            on_refused=self.refusals.put,
            beat=lambda: ring_pb2.Beat(progress=7, busy_s=0.5),
            on_beat=self.beats.put,
            places=(lambda: [Place(place) for place in places]) if places else None,
        )

    def up(self) -> EdgeSender:
        self.ups.get(timeout=WAIT_S)
        return self.edge


@contextlib.contextmanager
def receiving(**options: object) -> Iterator[Receiver]:
    receiver = Receiver(**options)  # type: ignore[arg-type]
    try:
        yield receiver
    finally:
        receiver.close()


@contextlib.contextmanager
def sending(address: str, **options: object) -> Iterator[Sender]:
    sender = Sender(address, **options)  # type: ignore[arg-type]
    try:
        yield sender
    finally:
        sender.edge.close()


class Peer:
    """tests/edge_peer.py in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge_peer", str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.read())

    def read(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], WAIT_S)[0], "the peer is silent"
        return self.process.stdout.readline().strip()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def peer_process(port: int = 0) -> Iterator[Peer]:
    peer = Peer(port)
    try:
        yield peer
    finally:
        peer.stop()


def step(seq: int = 1, epoch: int = 3, num_tensors: int = 1) -> ring_pb2.Frame:
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=epoch, seq=seq)
    frame.slots.add(session=5, position=seq, tokens=(7,), num_tensors=num_tensors)
    return frame


def raw(nbytes: int) -> Tensor:
    return Tensor("uint8", (nbytes,), random.Random(nbytes).randbytes(nbytes))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# -- streams that a test writes itself --------------------------------------------------------------------
def hello_message(**fields: int) -> bytes:
    hello = ring_pb2.Hello(protocol=PROTOCOL, epoch=3, from_rank=1, to_rank=2, **fields)
    return ring_pb2.Frame(kind=ring_pb2.HELLO, hello=hello).SerializeToString()


def parse(message: bytes) -> ring_pb2.EdgeReply:
    return ring_pb2.EdgeReply.FromString(message)


@contextlib.contextmanager
def raw_edge(receiver: Receiver) -> Iterator[tuple[SimpleQueue[bytes | None], Iterator[bytes]]]:
    """A stream whose messages the test writes itself."""
    outbox: SimpleQueue[bytes | None] = SimpleQueue()
    with grpc.insecure_channel(receiver.address) as channel:
        call = channel.stream_stream(EDGE_METHOD)(
            iter(outbox.get, None), metadata=token_metadata(TOKEN), timeout=WAIT_S
        )
        try:
            yield outbox, call
        finally:
            outbox.put(None)
            call.cancel()


def failure(replies: Iterator[bytes]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in replies:
            pass
    return caught.value.code(), caught.value.details()
