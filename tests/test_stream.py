"""The two kinds of stream do the same, and the fast one is the one that is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import grpc
import pytest

from cluster import edge_sender, stream
from cluster.rpc import connect, make_server
from cluster.stream import DirectStream, PlainStream, Stream, StreamEnded, open_stream
from tests.edges import WAIT_S, free_port, raw, receiving, sending, step

METHOD = "/test.Echo/Stream"
KINDS = [DirectStream, PlainStream]


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Sends back what comes; "end" ends the call and "abort" aborts it."""
    metadata = dict(context.invocation_metadata())
    yield str(metadata.get("key")).encode()
    for message in requests:
        if message == b"end":
            return
        if message == b"abort":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")
        yield message


@pytest.fixture
def server_channel() -> Iterator[grpc.Channel]:
    def add_to(server: grpc.Server) -> None:
        handlers = {"Stream": grpc.stream_stream_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))

    server, port = make_server("127.0.0.1:0", [add_to], None, max_workers=4)
    server.start()
    with connect(f"127.0.0.1:{port}", None) as channel:
        yield channel
    assert server.stop(0).wait(10.0)


def test_the_direct_stream_is_taken(server_channel: grpc.Channel) -> None:
    """Where a new grpcio breaks this, edges still work, at twice the cost."""
    call = open_stream(server_channel, METHOD, ())
    assert isinstance(call, DirectStream)
    finish(call)


def finish(call: Stream) -> StreamEnded:
    call.cancel()
    with pytest.raises(StreamEnded) as caught:
        for _ in call:
            pass
    call.drain()
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_messages_metadata_and_order(
    kind: Callable[[grpc.Channel, str, tuple[tuple[str, str], ...]], Stream], server_channel: grpc.Channel
) -> None:
    call = kind(server_channel, METHOD, (("key", "value"),))
    sent = [bytes([index % 256]) * (index * 997 % 300_000) for index in range(200)]
    for message in sent:
        call.put(message)
    replies = iter(call)
    assert next(replies) == b"value"
    assert [next(replies) for _ in sent] == sent
    assert finish(call).code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("last", "code", "details"),
    [
        (b"end", grpc.StatusCode.OK, ""),
        (b"abort", grpc.StatusCode.FAILED_PRECONDITION, "not today"),
    ],
)
def test_the_server_ends_the_stream(
    kind: Callable[[grpc.Channel, str, tuple[tuple[str, str], ...]], Stream],
    last: bytes,
    code: grpc.StatusCode,
    details: str,
    server_channel: grpc.Channel,
) -> None:
    call = kind(server_channel, METHOD, ())
    call.put(b"one")
    call.put(last)
    got = []
    with pytest.raises(StreamEnded) as caught:
        got.extend(iter(call))
    assert (got, caught.value.code, caught.value.details) == ([b"None", b"one"], code, details)
    call.put(b"too late")
    call.cancel()
    call.drain()


@pytest.mark.parametrize("kind", KINDS)
def test_cancel_from_another_thread_ends_the_iteration(
    kind: Callable[[grpc.Channel, str, tuple[tuple[str, str], ...]], Stream], server_channel: grpc.Channel
) -> None:
    call = kind(server_channel, METHOD, ())
    replies = iter(call)
    next(replies)
    ended: SimpleQueue[StreamEnded] = SimpleQueue()

    def read() -> None:
        try:
            next(replies)
        except StreamEnded as end:
            ended.put(end)

    reader = threading.Thread(target=read)
    reader.start()
    call.cancel()
    call.cancel()
    assert ended.get(timeout=WAIT_S).code is grpc.StatusCode.CANCELLED
    reader.join()
    call.drain()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_listens(kind: Callable[[grpc.Channel, str, tuple[tuple[str, str], ...]], Stream]) -> None:
    with connect(f"127.0.0.1:{free_port()}", None) as channel:
        call = kind(channel, METHOD, ())
        with pytest.raises(StreamEnded) as caught:
            next(iter(call))
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        call.drain()


def test_many_threads_put_and_nothing_is_lost(server_channel: grpc.Channel) -> None:
    call = open_stream(server_channel, METHOD, ())

    def put(number: int) -> None:
        for index in range(300):
            call.put(f"{number} {index}".encode())

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    replies = iter(call)
    next(replies)
    got = [next(replies).decode().split() for _ in range(1200)]
    for number in range(4):
        assert [int(index) for writer, index in got if writer == str(number)] == list(range(300))
    for thread in threads:
        thread.join()
    finish(call)


def test_another_grpcio_falls_back_to_the_public_stream(
    monkeypatch: pytest.MonkeyPatch, server_channel: grpc.Channel
) -> None:
    class Gone:
        def __init__(self, *_args: object) -> None:
            raise AttributeError("no segregated_call")

    monkeypatch.setattr(stream, "DirectStream", Gone)
    call = open_stream(server_channel, METHOD, ())
    assert isinstance(call, PlainStream)
    finish(call)


def test_an_edge_works_over_the_public_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "open_stream", PlainStream)
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        for seq in range(20):
            assert edge.send(step(seq), [raw(200_000 * seq)])
        for seq in range(20):
            got = receiver.frames.get(timeout=WAIT_S)
            assert (got.frame.seq, len(got.tensors[0].data)) == (seq, 200_000 * seq)
            got.consume()
        sender.beats.get(timeout=WAIT_S)
        receiver.service.abort("enough")
        assert sender.downs.get(timeout=WAIT_S).endswith("ended the edge: enough")
