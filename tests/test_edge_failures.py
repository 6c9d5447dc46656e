"""Edges whose other end dies, freezes, closes or fails; and what an edge leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import grpc
import psutil
import pytest

from cluster.ring import IncomingFrame
from cluster.rpc import connect
from proto.codec import PART_BYTES
from tests.edges import (
    ROOT,
    TOKEN,
    WAIT_S,
    Sender,
    peer_process,
    raw,
    receiving,
    sending,
    step,
    until,
)


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
