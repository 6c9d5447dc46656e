"""The far end of a measurement: what it answers, whom it refuses; it believes nothing of the wire."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import grpc
import pytest

from cluster import link_service
from cluster.link_service import MAX_PROBES, PROBE_METHOD, PROBE_SILENCE_S, WINDOW_BYTES, ProbeService
from cluster.rpc import make_server, token_metadata
from proto import ring_pb2
from proto.codec import PART_BYTES, Tensor, encode
from tests.edges import TOKEN, WAIT_S, failure, hello_message, parse

Accept = Callable[[ring_pb2.Hello], str | None]


@contextlib.contextmanager
def serving(accept: Accept = lambda _hello: None) -> Iterator[str]:
    service = ProbeService(accept, incarnation=5)
    server, port = make_server("127.0.0.1:0", [service.add_to], TOKEN, max_workers=8)
    server.start()
    yield f"127.0.0.1:{port}"
    assert server.stop(0).wait(WAIT_S)


@contextlib.contextmanager
def raw_probe(
    address: str, token: str | None = TOKEN
) -> Iterator[tuple[SimpleQueue[bytes | None], Iterator[bytes]]]:
    """A stream whose messages the test writes itself."""
    outbox: SimpleQueue[bytes | None] = SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(PROBE_METHOD)(
            iter(outbox.get, None), metadata=token_metadata(token), timeout=WAIT_S
        )
        try:
            yield outbox, call
        finally:
            outbox.put(None)
            call.cancel()


def step_message(nbytes: int = 100, kind: ring_pb2.Kind = ring_pb2.STEP) -> bytes:
    (message,) = encode(
        ring_pb2.Frame(kind=kind, is_batched=True), [Tensor("uint8", (nbytes,), bytes(nbytes))]
    )
    return message


def test_each_frame_is_answered_by_its_credit() -> None:
    with serving() as address, raw_probe(address) as (outbox, replies):
        outbox.put(hello_message())
        welcome = parse(next(replies)).welcome
        assert (welcome.incarnation, welcome.window_bytes) == (5, WINDOW_BYTES)
        for nbytes in (1, 100, PART_BYTES):
            message = step_message(nbytes)
            outbox.put(message)
            assert parse(next(replies)).credit.bytes == len(message)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([b"nonsense"], "is not a frame"),
        ([step_message()], "a measurement begins with HELLO"),
        ([hello_message(), b"\xff"], "is not a frame"),
        ([hello_message(), hello_message()], "a measurement consists of whole STEPs"),
        ([hello_message(), step_message(kind=ring_pb2.RESULT)], "a measurement consists of whole STEPs"),
        (
            [
                hello_message(),
                ring_pb2.Frame(
                    kind=ring_pb2.STEP,
                    is_batched=True,
                    payload_total_bytes=1 << 30,
                    tensors=[ring_pb2.TensorMeta(dtype=ring_pb2.UINT8, shape=[1 << 30])],
                ).SerializeToString(),
            ],
            "is over the limit of",
        ),
    ],
    ids=["no frame", "no hello", "no frame later", "two hellos", "another kind", "too large"],
)
def test_what_is_no_measurement_is_refused(messages: list[bytes], sentence: str) -> None:
    with serving() as address, raw_probe(address) as (outbox, replies):
        for message in messages:
            outbox.put(message)
        code, details = failure(replies)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert sentence in details


def test_a_measurement_may_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_service, "MAX_PROBE_BYTES", 3000)
    with serving() as address, raw_probe(address) as (outbox, replies):
        outbox.put(hello_message())
        for _ in range(3):
            outbox.put(step_message(1000))
        code, details = failure(replies)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == "a measurement may send 3000 bytes, and more came"


@pytest.mark.parametrize("name", ["PROBE_SILENCE_S", "MAX_PROBE_S"])
def test_a_caller_that_is_silent_or_stays_too_long_is_cut_off(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PROBE_SILENCE_S < WAIT_S
    monkeypatch.setattr(link_service, name, 0.3)
    with serving() as address, raw_probe(address) as (outbox, replies):
        outbox.put(hello_message())
        assert failure(replies)[0] is grpc.StatusCode.CANCELLED


def test_who_is_not_wanted_hears_why() -> None:
    with (
        serving(lambda _hello: "n1 runs with another config") as address,
        raw_probe(address) as (outbox, got),
    ):
        outbox.put(hello_message())
        assert failure(got) == (grpc.StatusCode.FAILED_PRECONDITION, "n1 runs with another config")


def test_another_protocol_is_refused() -> None:
    hello = ring_pb2.Hello(protocol=99, from_rank=1)
    with serving() as address, raw_probe(address) as (outbox, replies):
        outbox.put(ring_pb2.Frame(kind=ring_pb2.HELLO, hello=hello).SerializeToString())
        code, details = failure(replies)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert details.startswith("rank 1 speaks version 99 of the protocol and this node version")


def test_the_token_is_needed() -> None:
    with serving() as address, raw_probe(address, token=None) as (outbox, replies):
        outbox.put(hello_message())
        assert failure(replies)[0] is grpc.StatusCode.UNAUTHENTICATED


def test_only_so_many_at_once_and_then_others_again() -> None:
    with serving() as address, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(raw_probe(address)) for _ in range(MAX_PROBES)]
        for outbox, replies in streams:
            outbox.put(hello_message())
            next(replies)
        with raw_probe(address) as (outbox, replies):
            outbox.put(hello_message())
            code, details = failure(replies)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details.startswith(f"{MAX_PROBES} links to this node are being measured already")
        streams[0][0].put(None)
        with pytest.raises(StopIteration):
            next(streams[0][1])
        for _ in range(100):  # the place is free a moment after the caller heard of the end
            with raw_probe(address) as (outbox, replies):
                outbox.put(hello_message())
                with contextlib.suppress(grpc.RpcError):
                    next(replies)
                    return
            threading.Event().wait(0.01)
        pytest.fail("the place never became free")
