"""Edges to peers that do not keep to the protocol: each ends with a sentence and harms nobody."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from queue import SimpleQueue

import grpc
import psutil
import pytest

from cluster.edge_sender import EDGE_METHOD
from cluster.rpc import make_server, token_metadata
from proto import ring_pb2
from proto.codec import encode
from tests.edges import (
    TOKEN,
    WAIT_S,
    failure,
    hello_message,
    raw,
    raw_edge,
    receiving,
    sending,
    step,
)


# -- bad peers --------------------------------------------------------------------------------------------
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
