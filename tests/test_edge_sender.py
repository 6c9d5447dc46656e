"""The sending end of an edge: whom it greets and waits for, what it may send, how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from queue import SimpleQueue

import grpc
import pytest

from cluster import edge_sender
from cluster.edge_sender import EDGE_METHOD
from cluster.ring import CREDIT_BATCH_BYTES, NOT_ASSIGNED
from cluster.rpc import make_server
from proto import ring_pb2
from proto.codec import PART_BYTES
from tests.edges import WAIT_S, Sender, free_port, peer_process, raw, receiving, sending, step
from tests.waiting import is_in_time, wait_for


# -- greeting ---------------------------------------------------------------------------------------------
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
        receiving(accept=lambda _hello: answers.get(timeout=10)) as receiver,
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
    server.stop(0).wait(10.0)


def test_a_peer_that_is_not_there_yet_is_waited_for() -> None:
    port = free_port()
    with sending(f"127.0.0.1:{port}") as sender:
        wait_for(lambda: "refused" in sender.edge.waiting_for, WAIT_S, "a visible reason")
        assert sender.edge.waiting_for.startswith(f"rank 2 at 127.0.0.1:{port}: ")
        with peer_process(port) as peer:
            begin = time.monotonic()
            assert sender.up().send(step(), [raw(100)])
            assert is_in_time(time.monotonic() - begin, 5.0)  # gRPC's own backoff would soon be longer
            assert peer.read() == "frame 1 100"


def test_a_server_that_never_answers_hello_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "CONNECT_LIMIT_S", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        sending(f"127.0.0.1:{mute.getsockname()[1]}") as sender,
    ):
        wait_for(lambda: "has been silent for 0.3 s" in sender.edge.waiting_for, WAIT_S, "a visible reason")
        assert sender.downs.empty()


# -- credits ----------------------------------------------------------------------------------------------
def test_send_before_the_edge_is_up_and_after_its_end_sends_nothing() -> None:
    with receiving(accept=lambda _hello: NOT_ASSIGNED) as receiver, sending(receiver.address) as sender:
        assert not sender.edge.is_up
        assert not sender.edge.send(step(), [raw(10)])
    with receiving() as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        edge.close()
        assert not edge.send(step(), [raw(10)])


def test_the_sender_stays_within_the_window() -> None:
    window, size = 4 * PART_BYTES, PART_BYTES // 2
    with receiving(window_bytes=window) as receiver, sending(receiver.address) as sender:
        edge = sender.up()
        begin = time.monotonic()
        for seq in range(40):
            assert edge.send(step(seq), [raw(size)])
        assert is_in_time(time.monotonic() - begin, 1.0), "send does not block"
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


# -- bad receivers ----------------------------------------------------------------------------------------
def test_a_killed_receiver_is_found_at_once() -> None:
    with peer_process() as peer, sending(f"127.0.0.1:{peer.port}") as sender:
        edge = sender.up()
        edge.send(step(), [raw(10)])
        assert peer.read() == "frame 1 10"
        begin = time.monotonic()
        peer.process.kill()
        reason = sender.downs.get(timeout=WAIT_S)
        assert is_in_time(time.monotonic() - begin, 0.5)
        assert reason == f"the connection to rank 2 at 127.0.0.1:{peer.port} broke"
        assert not edge.is_up


def test_a_frozen_receiver_is_found_within_the_limit_and_close_does_not_wait_for_it() -> None:
    with peer_process() as peer, sending(f"127.0.0.1:{peer.port}") as sender:
        edge = sender.up()
        begin = time.monotonic()
        os.kill(peer.process.pid, signal.SIGSTOP)
        reason = sender.downs.get(timeout=WAIT_S)
        assert time.monotonic() - begin > 0.7
        assert is_in_time(time.monotonic() - begin, 1.5)
        assert reason == f"rank 2 at 127.0.0.1:{peer.port} has been silent for 1.0 s"
        with sending(f"127.0.0.1:{peer.port}") as second:
            begin = time.monotonic()
            edge.close()
            second.edge.close()
            assert is_in_time(time.monotonic() - begin, 1.0)


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
    server.stop(0).wait(10.0)


# -- ends -------------------------------------------------------------------------------------------------
def test_close_while_connecting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        for port in (mute.getsockname()[1], free_port()):
            sender = Sender(f"127.0.0.1:{port}")
            begin = time.monotonic()
            sender.edge.close()
            assert is_in_time(time.monotonic() - begin, 1.0)
            assert sender.downs.empty()
            assert sender.refusals.empty()


def test_close_of_a_live_edge_to_a_frozen_receiver_with_a_full_pipe() -> None:
    with peer_process() as peer, sending(f"127.0.0.1:{peer.port}") as sender:
        edge = sender.up()
        os.kill(peer.process.pid, signal.SIGSTOP)
        for seq in range(12):
            edge.send(step(seq), [raw(PART_BYTES)])
        begin = time.monotonic()
        edge.close()
        assert is_in_time(time.monotonic() - begin, 1.0)
        assert sender.downs.empty(), "no callback after close()"


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
