"""The receiving end of edges: whom it takes, what it refuses, and how one edge's end spares others."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from queue import SimpleQueue

import grpc
import psutil
import pytest

from cluster import edge_sender
from cluster.edge_sender import EDGE_METHOD
from cluster.ring import CREDIT_BATCH_BYTES, PROTOCOL, IncomingFrame
from cluster.rpc import token_metadata
from proto import ring_pb2
from proto.codec import PART_BYTES, encode
from tests.edges import (
    ROOT,
    TOKEN,
    WAIT_S,
    failure,
    hello_message,
    parse,
    raw,
    raw_edge,
    receiving,
    sending,
    step,
)
from tests.waiting import is_in_time, wait_for


# -- greeting ---------------------------------------------------------------------------------------------
def test_hello_reaches_accept() -> None:
    hellos: SimpleQueue[ring_pb2.Hello] = SimpleQueue()
    with receiving(accept=hellos.put) as receiver, sending(receiver.address) as sender:
        sender.up()
        hello = hellos.get(timeout=WAIT_S)
        assert (hello.epoch, hello.from_rank, hello.to_rank, hello.config_digest) == (3, 1, 2, "c")
        assert hello.protocol == PROTOCOL


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "PROTOCOL", 9)
    with receiving() as receiver, sending(receiver.address) as sender:
        assert sender.refusals.get(timeout=WAIT_S).endswith(
            "rank 1 speaks version 9 of the protocol and this node version 1; "
            "install the same macrame on every node"
        )


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


def test_a_stream_without_hello_is_cut_off() -> None:
    with receiving() as receiver, raw_edge(receiver) as (_outbox, replies):
        begin = time.monotonic()
        assert failure(replies)[0] is grpc.StatusCode.CANCELLED
        assert is_in_time(time.monotonic() - begin, 2.0)


# -- frames and credits -----------------------------------------------------------------------------------
def test_a_frame_of_another_epoch_is_dropped_and_its_credit_returned() -> None:
    with receiving(window_bytes=2 * PART_BYTES) as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        for _ in range(4):  # more than the window: without credit the last would never go
            edge.send(step(epoch=2), [raw(PART_BYTES)])
        edge.send(step(8, num_tensors=0), [])
        assert receiver.frames.get(timeout=WAIT_S).frame.seq == 8
        assert receiver.frames.empty()


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


# -- bad senders ------------------------------------------------------------------------------------------
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


SENDER_SCRIPT = """
import sys, threading
from proto import ring_pb2
from cluster.ring import EdgeSender
edge = EdgeSender(sys.argv[1], "token", ring_pb2.Hello(epoch=3, from_rank=1, to_rank=2),
                  on_up=lambda: print("up", flush=True), on_down=print, on_refused=print, beat=ring_pb2.Beat)
sys.stdin.read()
"""


@contextlib.contextmanager
def sender_process(address: str) -> Iterator[subprocess.Popen[str]]:
    """SENDER_SCRIPT in a process of its own, once its edge is up."""
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER_SCRIPT, address],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.communicate()


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
        with sender_process(receiver.address) as process:
            begin = time.monotonic()
            process.send_signal(number)
            hello, said = receiver.downs.get(timeout=WAIT_S)
            assert is_in_time(time.monotonic() - begin, limit_s)
            assert (hello.from_rank, hello.epoch, said) == (1, 3, reason)
        assert other.edge.send(step(), [raw(10)]), "the other edge lives on"
        assert receiver.frames.get(timeout=WAIT_S).hello.from_rank == 4


# -- ends -------------------------------------------------------------------------------------------------
def test_the_service_close_does_not_wait_for_a_frozen_sender() -> None:
    with receiving() as receiver, sender_process(receiver.address) as process:
        process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        receiver.service.close()
        assert receiver.server.stop(0).wait(10.0)
        assert is_in_time(time.monotonic() - begin, 1.0)
        assert receiver.downs.empty(), "no callback after close()"


def test_a_closing_receiver_says_so() -> None:
    with receiving() as receiver, sending(receiver.address) as sender:
        sender.up()
        receiver.service.close()
        assert (
            sender.downs.get(timeout=WAIT_S) == f"rank 2 at {receiver.address} ended the edge: it is closing"
        )
        with sending(receiver.address) as late:
            wait_for(lambda: "it is closing" in late.edge.waiting_for, WAIT_S, "a visible reason")


def test_a_second_stream_of_an_edge_waits_until_the_first_is_over() -> None:
    with receiving() as receiver, sending(receiver.address) as first:
        first.up()
        with sending(receiver.address) as second:
            wait_for(lambda: "another stream of the same edge" in second.edge.waiting_for, WAIT_S)
            assert receiver.downs.empty()
            assert first.edge.send(step(epoch=3), [raw(10)])
            assert receiver.frames.get(timeout=WAIT_S).frame.epoch == 3
            first.edge.close()
            second.up()


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
