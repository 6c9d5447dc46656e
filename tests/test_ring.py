"""Both ends of an edge together: frames arrive whole and in order, and nothing is left when it ends."""

from __future__ import annotations

import threading
import time

import grpc
import psutil

from cluster.rpc import connect
from proto import ring_pb2
from proto.codec import PART_BYTES
from tests.edges import TOKEN, WAIT_S, peer_process, raw, receiving, sending, step
from tests.waiting import is_in_time, wait_for


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


def test_no_thread_and_no_descriptor_is_left() -> None:
    """Twenty edges are opened and closed, half of them cut by the receiver."""
    process, num_others = psutil.Process(), threading.active_count()  # those of what all tests share

    def one(is_cut: bool) -> None:
        with receiving() as receiver, sending(receiver.address) as sender:
            edge = sender.up()
            edge.send(step(), [raw(100)])
            receiver.frames.get(timeout=WAIT_S).consume()
            if is_cut:
                receiver.service.abort("cut")
                sender.downs.get(timeout=WAIT_S)

    one(False)  # what gRPC opens once for the process is not a leak
    wait_for(lambda: threading.active_count() <= num_others, WAIT_S, "the first edge's threads end")
    num_threads, num_fds = process.num_threads(), process.num_fds()
    for index in range(20):
        one(index % 2 == 0)
    wait_for(lambda: threading.active_count() <= num_others, WAIT_S, "all Python threads end")
    wait_for(lambda: process.num_fds() <= num_fds, WAIT_S, "all descriptors are closed")
    wait_for(lambda: process.num_threads() <= num_threads + 2, WAIT_S, "all other threads end")


def test_connect_survives_a_restart_of_the_server() -> None:
    """The channel reconnects by itself within about a second."""
    with peer_process() as peer:
        port = peer.port
        channel = connect(f"127.0.0.1:{port}", TOKEN)
        grpc.channel_ready_future(channel).result(5)
    with peer_process(port), channel:
        begin = time.monotonic()
        grpc.channel_ready_future(channel).result(5)
        assert is_in_time(time.monotonic() - begin, 2.5)
