"""Both ends of an edge over real gRPC on loopback: greeting, frames, credits, heartbeats, failure, ends."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import psutil
import pytest

from cluster import edge_sender, heartbeat
from cluster.edge_sender import EDGE_METHOD
from cluster.ring import CREDIT_BATCH_BYTES, NOT_ASSIGNED, PROTOCOL, EdgeSender, EdgeService, IncomingFrame
from cluster.rpc import connect, make_server, token_metadata
from proto import ring_pb2
from proto.codec import PART_BYTES, Tensor, encode

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "token"
WAIT_S = 10.0


class Receiver:
    """An EdgeService with its server, and queues of what it reports."""

    def __init__(
        self, accept: Callable[[ring_pb2.Hello], str | None] = lambda _hello: None, **options: int
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
        self.server, self.port = make_server("127.0.0.1:0", [self.service.add_to], TOKEN, max_workers=8)
        self.server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self.service.close()
        assert self.server.stop(0).wait(1.0)


class Sender:
    """An EdgeSender and queues of what it reports."""

    def __init__(self, address: str, token: str | None = TOKEN, epoch: int = 3, from_rank: int = 1) -> None:
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


def until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        pause.wait(0.005)


# -- frames -----------------------------------------------------------------------------------------------
def test_frames_of_all_sizes_arrive_in_order_and_whole() -> None:
    sizes = [0, 1, 8192, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES, 20 * PART_BYTES + 3, 8192]
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        for seq, size in enumerate(sizes):
            assert edge.send(step(seq), [raw(size)])
        for seq, size in enumerate(sizes):
            got = receiver.frames.get(timeout=WAIT_S)
            assert got.frame.seq == seq
            assert bytes(got.tensors[0].data) == raw(size).data
            assert got.hello.from_rank == 1
            got.consume()
        frame = ring_pb2.Frame(kind=ring_pb2.RESULT, epoch=3, seq=99)
        assert edge.send(frame)
        assert receiver.frames.get(timeout=WAIT_S).frame.kind == ring_pb2.RESULT


def test_a_frame_of_another_epoch_is_dropped_and_its_credit_returned() -> None:
    with receiving(window_bytes=2 * PART_BYTES) as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        for _ in range(4):  # more than the window: without credit the last would never go
            edge.send(step(epoch=2), [raw(PART_BYTES)])
        edge.send(step(8, num_tensors=0), [])
        assert receiver.frames.get(timeout=WAIT_S).frame.seq == 8
        assert receiver.frames.empty()


def test_send_before_the_edge_is_up_and_after_its_end_sends_nothing() -> None:
    with receiving(accept=lambda _hello: NOT_ASSIGNED) as receiver, sending(receiver.address) as sender:
        assert not sender.edge.is_up
        assert not sender.edge.send(step(), [raw(10)])
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        edge.close()
        assert not edge.send(step(), [raw(10)])


# -- greeting ---------------------------------------------------------------------------------------------
def test_hello_reaches_accept() -> None:
    hellos: SimpleQueue[ring_pb2.Hello] = SimpleQueue()
    with receiving(accept=hellos.put) as receiver, sending(receiver.address) as sender:
        sender.up()
        hello = hellos.get(timeout=WAIT_S)
        assert (hello.epoch, hello.from_rank, hello.to_rank, hello.config_digest) == (3, 1, 2, "c")
        assert hello.protocol == PROTOCOL


def test_a_refusal_is_final_and_says_why() -> None:
    with (
        receiving(accept=lambda _hello: "rank 1 runs with another plan") as receiver,
        sending(receiver.address) as sender,
    ):
        reason = sender.refusals.get(timeout=WAIT_S)
        assert reason == f"rank 2 at {receiver.address} refused the edge: rank 1 runs with another plan"
        assert sender.ups.empty()
        assert sender.downs.empty()
        assert receiver.downs.empty(), "what was never accepted does not go down"


def test_not_assigned_yet_is_tried_again() -> None:
    answers: SimpleQueue[str | None] = SimpleQueue()
    for answer in (NOT_ASSIGNED, NOT_ASSIGNED, None):
        answers.put(answer)
    with (
        receiving(accept=lambda _hello: answers.get(timeout=1)) as receiver,
        sending(receiver.address) as sender,
    ):
        sender.up()
        assert answers.empty()
        assert sender.edge.waiting_for == ""


def test_a_wrong_token_is_final() -> None:
    with receiving() as receiver:
        for token in ("wrong", None):
            with sending(receiver.address, token=token) as sender:
                assert "the cluster token is missing or wrong" in sender.refusals.get(timeout=WAIT_S)


def test_a_server_without_rings_is_final() -> None:
    server, port = make_server("127.0.0.1:0", [], None, max_workers=1)
    server.start()
    with sending(f"127.0.0.1:{port}") as sender:
        assert "refused the edge" in sender.refusals.get(timeout=WAIT_S)
    server.stop(0).wait(1.0)


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "PROTOCOL", 9)
    with receiving() as receiver, sending(receiver.address) as sender:
        assert sender.refusals.get(timeout=WAIT_S).endswith(
            "rank 1 speaks version 9 of the protocol and this node version 1; "
            "install the same macrame on every node"
        )


def test_a_peer_that_is_not_there_yet_is_waited_for() -> None:
    port = free_port()
    with sending(f"127.0.0.1:{port}") as sender:
        until(lambda: "refused" in sender.edge.waiting_for, "a visible reason to wait")
        assert sender.edge.waiting_for.startswith(f"rank 2 at 127.0.0.1:{port}: ")
        with peer_process(port) as peer:
            begin = time.monotonic()
            assert sender.up().send(step(), [raw(100)])
            assert time.monotonic() - begin < 2.0
            assert peer.read() == "frame 1 100"


def test_close_while_connecting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        for port in (mute.getsockname()[1], free_port()):
            sender = Sender(f"127.0.0.1:{port}")
            begin = time.monotonic()
            sender.edge.close()
            assert time.monotonic() - begin < 1.0
            assert sender.downs.empty()
            assert sender.refusals.empty()


def test_a_server_that_never_answers_hello_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "CONNECT_LIMIT_S", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        sending(f"127.0.0.1:{mute.getsockname()[1]}") as sender,
    ):
        until(lambda: "has been silent for 0.3 s" in sender.edge.waiting_for, "a visible reason to wait")
        assert sender.downs.empty()


# -- credits ----------------------------------------------------------------------------------------------
def test_the_sender_stays_within_the_window() -> None:
    window, size = 4 * PART_BYTES, PART_BYTES // 2
    with receiving(window_bytes=window) as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        begin = time.monotonic()
        for seq in range(40):
            assert edge.send(step(seq), [raw(size)])
        assert time.monotonic() - begin < 1.0, "send does not block"
        held = [receiver.frames.get(timeout=WAIT_S)]
        beats = receiver.beats
        for _ in range(3):  # beats overtake what waits for credit
            beats.get(timeout=WAIT_S)
        while not receiver.frames.empty():
            held.append(receiver.frames.get())
        assert len(held) == 7, "the eighth would be over the window by its header"
        for seq in range(40):
            got = held.pop(0) if held else receiver.frames.get(timeout=WAIT_S)
            assert got.frame.seq == seq
            got.consume()


def test_a_frame_larger_than_the_window_goes_alone() -> None:
    with receiving(window_bytes=PART_BYTES) as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        sizes = [100, 5 * PART_BYTES, 100, 5 * PART_BYTES, CREDIT_BATCH_BYTES - 1000, 2 * PART_BYTES]
        for seq, size in enumerate(sizes):
            edge.send(step(seq), [raw(size)])
        for seq, size in enumerate(sizes):
            got = receiver.frames.get(timeout=WAIT_S)
            assert (got.frame.seq, len(got.tensors[0].data)) == (seq, size)
            if size > PART_BYTES:
                receiver.beats.get(timeout=WAIT_S)
                assert receiver.frames.empty(), "nothing follows before it is consumed"
            got.consume()


def test_small_credits_are_sent_in_batches() -> None:
    with receiving() as receiver:
        stub = raw_edge(receiver)
        with stub as (outbox, replies):
            outbox.put(hello_message())
            assert parse(next(replies)).welcome.window_bytes == 16 << 20
            nbytes = 0
            for seq in range(20):
                (message,) = encode(step(seq), [raw(8192)])
                nbytes += len(message)
                outbox.put(message)
            for _ in range(20):
                receiver.frames.get(timeout=WAIT_S).consume()
            given = [parse(next(replies)).credit.bytes for _ in range(2)]
            assert all(CREDIT_BATCH_BYTES <= credit < CREDIT_BATCH_BYTES + 8400 for credit in given)
            assert nbytes - sum(given) < CREDIT_BATCH_BYTES


def test_a_sender_that_ignores_its_window_is_cut_off() -> None:
    with receiving(window_bytes=PART_BYTES) as receiver, raw_edge(receiver) as (outbox, replies):
        outbox.put(hello_message())
        next(replies)
        for seq in range(8):
            outbox.put(encode(step(seq), [raw(PART_BYTES // 2)])[0])
        assert failure(replies) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "rank 1 sent a bad frame: more than the window of 1048576 bytes came without credit",
        )
        assert receiver.downs.get(timeout=WAIT_S)[1].endswith("came without credit")


def test_an_overflow_brings_the_edge_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "MAX_WAITING_BYTES", 4 * PART_BYTES)
    with receiving(window_bytes=PART_BYTES) as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        while edge.send(step(), [raw(PART_BYTES)]):
            pass
        reason = sender.downs.get(timeout=WAIT_S)
        peer = re.escape(f"rank 2 at {receiver.address}")
        assert re.fullmatch(rf"{peer} does not keep up: \d+ bytes wait to be sent", reason)
        assert not edge.is_up


# -- heartbeats -------------------------------------------------------------------------------------------
def test_beats_go_both_ways_and_measure_the_hop() -> None:
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        begin = time.monotonic()
        for _ in range(5):
            assert receiver.beats.get(timeout=WAIT_S).progress == 7
            beat = sender.beats.get(timeout=WAIT_S)
            assert (beat.progress, beat.activity) == (11, "computing")
        assert 0.5 < time.monotonic() - begin < 3.0
        hops_ms = edge.recent_hop_ms()
        assert len(hops_ms) >= 5
        assert 0 < min(hops_ms) < 100


def test_a_long_computation_is_not_silence() -> None:
    """Nobody consumes and nothing is sent for longer than the limit: the edge stays."""
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        edge.send(step(), [raw(10)])
        for _ in range(8):
            sender.beats.get(timeout=WAIT_S)
        assert edge.is_up
        receiver.frames.get(timeout=WAIT_S).consume()
        assert edge.send(step(2), [raw(10)])
        assert receiver.frames.get(timeout=WAIT_S).frame.seq == 2
        assert sender.downs.empty()


def test_a_stop_of_our_own_process_is_not_the_peers_silence() -> None:
    """The timer thread counts at most two ticks for one, however long it could not run."""
    counted: SimpleQueue[float] = SimpleQueue()

    class Slow:
        def tick(self, elapsed_s: float) -> None:
            counted.put(elapsed_s)
            threading.Event().wait(0.5)

    watched = Slow()
    timer = heartbeat.Heartbeat()
    timer.watch(watched)
    seconds = [counted.get(timeout=WAIT_S) for _ in range(3)]
    timer.unwatch(watched)
    assert max(seconds) <= 2 * heartbeat.TICK_S + 1e-9


# -- failure ----------------------------------------------------------------------------------------------
def test_a_killed_receiver_is_found_at_once() -> None:
    with peer_process() as peer, sending(f"127.0.0.1:{peer.port}") as sender:
        edge = sender.up()
        edge.send(step(), [raw(10)])
        assert peer.read() == "frame 1 10"
        begin = time.monotonic()
        peer.process.kill()
        reason = sender.downs.get(timeout=WAIT_S)
        assert time.monotonic() - begin < 0.5
        assert reason == f"the connection to rank 2 at 127.0.0.1:{peer.port} broke"
        assert not edge.is_up


def test_a_frozen_receiver_is_found_within_the_limit_and_close_does_not_wait_for_it() -> None:
    with peer_process() as peer, sending(f"127.0.0.1:{peer.port}") as sender:
        edge = sender.up()
        begin = time.monotonic()
        os.kill(peer.process.pid, signal.SIGSTOP)
        reason = sender.downs.get(timeout=WAIT_S)
        assert 0.7 < time.monotonic() - begin < 1.5
        assert reason == f"rank 2 at 127.0.0.1:{peer.port} has been silent for 1.0 s"
        with sending(f"127.0.0.1:{peer.port}") as second:
            begin = time.monotonic()
            edge.close()
            second.edge.close()
            assert time.monotonic() - begin < 1.0


def test_close_of_a_live_edge_to_a_frozen_receiver_with_a_full_pipe() -> None:
    with peer_process() as peer, sending(f"127.0.0.1:{peer.port}") as sender:
        edge = sender.up()
        os.kill(peer.process.pid, signal.SIGSTOP)
        for seq in range(12):
            edge.send(step(seq), [raw(PART_BYTES)])
        begin = time.monotonic()
        edge.close()
        assert time.monotonic() - begin < 1.0
        assert sender.downs.empty(), "no callback after close()"


SENDER_SCRIPT = """
import sys, threading
from proto import ring_pb2
from cluster.ring import EdgeSender
edge = EdgeSender(sys.argv[1], "token", ring_pb2.Hello(epoch=3, from_rank=1, to_rank=2),
                  on_up=lambda: print("up", flush=True), on_down=print, on_refused=print, beat=ring_pb2.Beat)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("number", "limit_s", "reason"),
    [
        (signal.SIGKILL, 0.5, "the connection from rank 1 ended"),
        (signal.SIGSTOP, 1.5, "rank 1 has been silent for 1.0 s"),
    ],
)
def test_a_sender_that_dies_or_freezes(number: int, limit_s: float, reason: str) -> None:
    with receiving() as receiver, sending(receiver.address, from_rank=4) as other:
        other.up()
        process = subprocess.Popen(
            [sys.executable, "-c", SENDER_SCRIPT, receiver.address],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            begin = time.monotonic()
            process.send_signal(number)
            hello, said = receiver.downs.get(timeout=WAIT_S)
            assert time.monotonic() - begin < limit_s
            assert (hello.from_rank, hello.epoch, said) == (1, 3, reason)
        finally:
            process.kill()
            process.communicate()
        assert other.edge.send(step(), [raw(10)]), "the other edge lives on"
        assert receiver.frames.get(timeout=WAIT_S).hello.from_rank == 4


def test_the_service_close_does_not_wait_for_a_frozen_sender() -> None:
    with receiving() as receiver:
        process = subprocess.Popen(
            [sys.executable, "-c", SENDER_SCRIPT, receiver.address],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            receiver.service.close()
            assert receiver.server.stop(0).wait(1.0)
            assert time.monotonic() - begin < 1.0
            assert receiver.downs.empty(), "no callback after close()"
        finally:
            process.kill()
            process.communicate()


def test_a_closing_receiver_says_so() -> None:
    with receiving() as receiver, sending(receiver.address) as sender:
        sender.up()
        receiver.service.close()
        assert (
            sender.downs.get(timeout=WAIT_S) == f"rank 2 at {receiver.address} ended the edge: it is closing"
        )
        with sending(receiver.address) as late:
            until(lambda: "it is closing" in late.edge.waiting_for, "a visible reason to wait")


def test_abort_ends_old_epochs_only_and_gives_the_reason() -> None:
    with (
        receiving() as receiver,
        sending(receiver.address, epoch=3) as old,
        sending(receiver.address, epoch=4) as new,
    ):
        old.up()
        new.up()
        receiver.service.abort("epoch 3 is over", before_epoch=4)
        assert old.downs.get(timeout=WAIT_S).endswith("ended the edge: epoch 3 is over")
        assert receiver.downs.get(timeout=WAIT_S)[1] == "epoch 3 is over"
        assert new.edge.send(step(epoch=4), [raw(10)])
        assert receiver.frames.get(timeout=WAIT_S).frame.epoch == 4


def test_a_closed_sender_goes_down_at_the_receiver() -> None:
    with receiving() as receiver, sending(receiver.address) as sender:
        sender.up().close()
        hello, reason = receiver.downs.get(timeout=WAIT_S)
        assert hello.from_rank == 1
        assert reason in ("rank 1 closed the edge", "the connection from rank 1 ended")


def test_an_error_in_on_frame_ends_the_edge_with_its_reason() -> None:
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()

        def broken(_incoming: IncomingFrame) -> None:
            raise RuntimeError("the queue is full")

        receiver.service.on_frame = broken
        edge.send(step(), [raw(10)])
        assert sender.downs.get(timeout=WAIT_S).endswith(
            "a frame of rank 1 could not be taken: the queue is full"
        )
        assert (
            receiver.downs.get(timeout=WAIT_S)[1] == "a frame of rank 1 could not be taken: the queue is full"
        )


def test_an_edge_can_be_made_again_from_on_down() -> None:
    """As the owner does it: the callback closes the broken sender and another one connects."""
    with receiving() as receiver:
        again: SimpleQueue[Sender] = SimpleQueue()
        first = Sender(receiver.address)
        edge = first.up()

        def renew(_reason: str) -> None:
            edge.close()
            again.put(Sender(receiver.address, epoch=4))

        edge._on_down = renew
        receiver.service.abort("try again")
        second = again.get(timeout=WAIT_S)
        assert second.up().send(step(epoch=4), [raw(5)])
        assert receiver.frames.get(timeout=WAIT_S).frame.epoch == 4
        second.edge.close()


# -- bad peers --------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\xff" * 100, "a message of 100 bytes is not a frame"),
        (b"", "a frame is of unknown kind 0"),
        (step(num_tensors=0).SerializeToString(), "an edge begins with HELLO"),
    ],
)
def test_a_stream_that_begins_with_something_else(message: bytes, sentence: str) -> None:
    with receiving() as receiver, raw_edge(receiver) as (outbox, replies):
        outbox.put(message)
        assert failure(replies) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)
        assert receiver.downs.empty()


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\xff" * 100, "a message of 100 bytes is not a frame"),
        (hello_message(), "HELLO came twice"),
        (encode(step(num_tensors=2), [raw(8)])[0], "frame 1 has 1 tensors; its slots count 2"),
    ],
)
def test_a_bad_message_ends_only_its_own_stream(message: bytes, sentence: str) -> None:
    with receiving() as receiver, sending(receiver.address, from_rank=4) as good:
        good.up()
        with raw_edge(receiver) as (outbox, replies):
            outbox.put(hello_message())
            next(replies)
            outbox.put(message)
            reason = f"rank 1 sent a bad frame: {sentence}"
            assert failure(replies) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
            hello, said = receiver.downs.get(timeout=WAIT_S)
            assert (hello.from_rank, said) == (1, reason)
        assert good.edge.send(step(), [raw(10)])
        assert receiver.frames.get(timeout=WAIT_S).hello.from_rank == 4


def test_a_stream_without_hello_is_cut_off() -> None:
    with receiving() as receiver, raw_edge(receiver) as (_outbox, replies):
        begin = time.monotonic()
        assert failure(replies)[0] is grpc.StatusCode.CANCELLED
        assert time.monotonic() - begin < 2.0


GIGABYTE_SCRIPT = """
import grpc, sys
from cluster.edge_sender import EDGE_METHOD
channel = grpc.insecure_channel(sys.argv[1], options=[("grpc.max_send_message_length", -1)])
messages = iter([bytes(1 << 30)])
token = [("authorization", "Bearer token")]
try:
    list(channel.stream_stream(EDGE_METHOD)(messages, metadata=token, timeout=60))
except grpc.RpcError as error:
    print(error.code().name, error.details())
"""


def test_a_frame_of_a_gigabyte_is_refused_and_harms_nobody() -> None:
    """In one message, and as a frame that announces so much."""
    size = 1 << 30
    with receiving() as receiver, sending(receiver.address, from_rank=4) as good:
        edge = good.up()
        before = psutil.Process().memory_info().rss
        done = subprocess.run(
            [sys.executable, "-c", GIGABYTE_SCRIPT, receiver.address],
            capture_output=True,
            text=True,
            check=True,
        )
        # Which of the two depends on whether its first byte comes within the time that HELLO has.
        assert done.stdout.startswith(("RESOURCE_EXHAUSTED", "CANCELLED")), done
        with raw_edge(receiver) as (outbox, replies):
            outbox.put(hello_message())
            next(replies)
            announced = step(num_tensors=1)
            announced.payload_total_bytes = size
            announced.tensors.add(dtype=ring_pb2.UINT8, shape=(size,))
            outbox.put(announced.SerializeToString())
            assert "is over the limit of 268435456 bytes" in failure(replies)[1]
        assert psutil.Process().memory_info().rss - before < 64 << 20
        assert edge.is_up
        assert edge.send(step(), [raw(10)])
        assert receiver.frames.get(timeout=WAIT_S).hello.from_rank == 4
        assert good.downs.empty()


def test_a_message_over_the_limit_ends_its_stream() -> None:
    with receiving() as receiver:
        outbox: SimpleQueue[bytes | None] = SimpleQueue()
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(receiver.address, options=options) as channel:
            replies = channel.stream_stream(EDGE_METHOD)(
                iter(outbox.get, None), metadata=token_metadata(TOKEN)
            )
            outbox.put(hello_message())
            next(replies)
            outbox.put(bytes(5 << 20))
            assert failure(replies)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            outbox.put(None)
        assert receiver.downs.get(timeout=WAIT_S)[0].from_rank == 1


def test_random_bytes_on_the_port_harm_nobody() -> None:
    rng = random.Random(3)
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        for opening in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", receiver.port)) as stranger,
            ):
                stranger.sendall(opening + rng.randbytes(100_000))
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(65536):
                    pass
        assert edge.send(step(), [raw(10)])
        receiver.frames.get(timeout=WAIT_S)
        assert sender.downs.empty()


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([b"\xff\xff"], "has been silent"),  # never up: seen below
        (
            [ring_pb2.EdgeReply(credit=ring_pb2.Credit(bytes=2**63))],
            "gave credit for 9223372036854775808 bytes of 0",
        ),
        ([ring_pb2.EdgeReply()], "sent a reply that is none"),
        ([b"\xff\xff"], "sent a reply that is none"),
        ([ring_pb2.EdgeReply(abort=ring_pb2.Abort(reason="enough"))], "ended the edge: enough"),
    ][1:],
)
def test_a_receiver_that_answers_nonsense(answers: list[ring_pb2.EdgeReply | bytes], sentence: str) -> None:
    welcome = ring_pb2.EdgeReply(welcome=ring_pb2.Welcome(window_bytes=1000)).SerializeToString()

    def behave(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield welcome
        for answer in answers:
            yield answer if isinstance(answer, bytes) else answer.SerializeToString()
        for _ in requests:
            pass

    def add_to(server: grpc.Server) -> None:
        service, method = EDGE_METHOD[1:].split("/")
        handler = grpc.stream_stream_rpc_method_handler(behave)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))

    server, port = make_server("127.0.0.1:0", [add_to], None, max_workers=2)
    server.start()
    with sending(f"127.0.0.1:{port}") as sender:
        assert sentence in sender.downs.get(timeout=WAIT_S)
    server.stop(0).wait(1.0)


# -- ends -------------------------------------------------------------------------------------------------
def test_no_thread_and_no_descriptor_is_left() -> None:
    """Twenty edges are opened and closed, half of them cut by the receiver."""
    process = psutil.Process()

    def one(is_cut: bool) -> None:
        with receiving() as receiver, sending(receiver.address) as sender:
            edge = sender.up()
            edge.send(step(), [raw(100)])
            receiver.frames.get(timeout=WAIT_S).consume()
            if is_cut:
                receiver.service.abort("cut")
                sender.downs.get(timeout=WAIT_S)

    one(False)  # what gRPC opens once for the process is not a leak
    until(lambda: threading.active_count() == 1, "the first edge's threads end")
    num_threads, num_fds = process.num_threads(), process.num_fds()
    for index in range(20):
        one(index % 2 == 0)
    until(lambda: threading.active_count() == 1, "all Python threads end")
    until(lambda: process.num_fds() <= num_fds, "all descriptors are closed")
    until(lambda: process.num_threads() <= num_threads + 2, "all other threads end")


def test_connect_survives_a_restart_of_the_server() -> None:
    """The channel reconnects by itself within about a second."""
    with peer_process() as peer:
        port = peer.port
        channel = connect(f"127.0.0.1:{port}", TOKEN)
        grpc.channel_ready_future(channel).result(5)
    with peer_process(port), channel:
        begin = time.monotonic()
        grpc.channel_ready_future(channel).result(5)
        assert time.monotonic() - begin < 2.5
