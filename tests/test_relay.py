"""The relay that stands in for links: what it promises, and that a ring's edge goes through it."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edges import WAIT_S, receiving, sending, step
from tests.reference import greedy
from tests.relay import Relay, RelayProcess, Shape
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

DATA = random.Random(1).randbytes(300_000)


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        yield listener


@contextlib.contextmanager
def relayed(**shapes: Shape) -> Iterator[tuple[Relay, socket.socket, socket.socket]]:
    """A relay, its client's end and its target's."""
    with (
        listening() as listener,
        Relay(listener.getsockname(), **shapes) as relay,
        connected(relay.port) as client,
        listener.accept()[0] as server,
    ):
        server.settimeout(WAIT_S)
        yield relay, client, server


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), WAIT_S)


def is_reset(port: int) -> bool:
    """Whether a new connection is; its end may come before connect() returns, or after."""
    try:
        with connected(port) as end:
            end.recv(1)
    except ConnectionResetError:
        return True
    return False


def receive(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def is_silent(end: socket.socket, seconds: float) -> bool:
    return not select.select([end], [], [], seconds)[0]


def passing_s(sender: socket.socket, receiver: socket.socket, data: bytes) -> float:
    """From the first byte's sending to the last one's coming."""
    started = time.perf_counter()
    pushing = threading.Thread(target=sender.sendall, args=(data,))
    pushing.start()
    assert receive(receiver, len(data)) == data
    pushing.join()
    return time.perf_counter() - started


def test_bytes_pass_whole_in_both_directions_and_are_counted() -> None:
    with relayed() as (relay, client, server):
        passing_s(client, server, DATA)
        passing_s(server, client, DATA[:1000])
        assert (relay.bytes_to_target, relay.bytes_to_client) == (len(DATA), 1000)
        assert relay.num_connections == 1


def test_a_delay_is_of_one_direction() -> None:
    with relayed(to_target=Shape(delay_ms=1000.0)) as (relay, client, server):
        assert passing_s(client, server, b"x") >= 1.0
        assert min(passing_s(server, client, b"x") for _ in range(3)) < 1.0
        relay.shape(to_target=Shape(), to_client=Shape(delay_ms=1000.0))
        assert min(passing_s(client, server, b"x") for _ in range(3)) < 1.0
        assert passing_s(server, client, b"x") >= 1.0


def test_a_rate_holds_for_all_bytes_and_comes_before_the_delay() -> None:
    with relayed(to_target=Shape(delay_ms=50.0, bytes_s=1e6)) as (_, client, server):
        assert passing_s(client, server, DATA) >= 0.3 + 0.05
        assert passing_s(client, server, b"x" * 10_000) >= 0.01 + 0.05


def test_connections_share_the_line() -> None:
    with listening() as listener, Relay(listener.getsockname(), to_target=Shape(bytes_s=1e6)) as relay:
        started = time.perf_counter()
        with contextlib.ExitStack() as ends:
            pairs = []
            for _ in range(2):
                client = ends.enter_context(connected(relay.port))
                pairs.append((client, ends.enter_context(listener.accept()[0])))
            for client, _ in pairs:
                client.sendall(DATA[:100_000])
            for _, server in pairs:
                assert receive(server, 100_000) == DATA[:100_000]
        assert time.perf_counter() - started >= 0.2


def test_a_stall_holds_bytes_back_and_keeps_the_connection() -> None:
    with relayed() as (relay, client, server):
        relay.stall(to_client=False)
        client.sendall(DATA[:1000])
        passing_s(server, client, b"other way")
        assert is_silent(server, 0.1)
        relay.resume()
        assert receive(server, 1000) == DATA[:1000]


def test_what_a_stall_holds_is_bounded_where_there_is_a_rate() -> None:
    with relayed(to_target=Shape(bytes_s=1e9)) as (relay, client, server):
        relay.stall()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(1000):
                client.sendall(DATA)  # 300 MB in all
            raise AssertionError("all of it was taken")
        assert relay.bytes_to_target == 0
        assert is_silent(server, 0.0)


def test_a_cut_resets_connections_until_it_is_mended() -> None:
    with relayed() as (relay, client, server):
        relay.cut()
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        assert is_reset(relay.port)
        relay.mend()
        with connected(relay.port):
            deadline = time.monotonic() + WAIT_S
            while relay.num_connections != 1 and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            assert relay.num_connections == 1


def test_the_end_of_one_side_comes_behind_its_bytes() -> None:
    with relayed(to_target=Shape(delay_ms=50.0)) as (_, client, server):
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert receive(server, 100) == b"last words"
        server.sendall(b"and an answer")
        server.close()
        assert receive(client, 100) == b"and an answer"


def test_a_reset_goes_through() -> None:
    with relayed() as (_, client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        with pytest.raises(ConnectionResetError):
            server.recv(1)


def test_without_a_target_clients_are_reset() -> None:
    with listening() as listener:
        target = listener.getsockname()
    with Relay(target) as relay:
        assert is_reset(relay.port)


def test_relays_in_a_process_of_their_own() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with RelayProcess([(port, Shape()), (port, Shape(delay_ms=50.0))], is_one_way=True) as relays:
            for relay_port, least_s in zip(relays.ports, (0.0, 0.05), strict=True):
                with connected(relay_port) as client, listener.accept()[0] as server:
                    assert passing_s(client, server, DATA[:1000]) >= least_s
                    passing_s(server, client, DATA[:1000])


def test_an_edge_goes_through_it_and_a_stall_is_found_as_silence() -> None:
    with (
        receiving() as receiver,
        Relay(("127.0.0.1", receiver.port)) as relay,
        sending(relay.address) as sender,
    ):
        assert sender.up().send(step(num_tensors=0))
        assert receiver.frames.get(timeout=WAIT_S).frame.seq == 1
        relay.stall()
        assert "silent" in sender.downs.get(timeout=WAIT_S)


def test_a_rings_edges_go_through_relays_and_it_mends_after_a_cut(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=3)
    prompt = [72, 101, 108, 108, 111]
    ring = RingProcesses(tmp_path, model, [(0, 1), (1, 3)])
    there, back = (Relay(("127.0.0.1", port)) for port in (ring.ports[1], ring.ports[0]))
    ring.faults = {0: f"edges_via=1@{there.port}", 1: f"edges_via=0@{back.port}"}
    with there, back, ring:
        epoch = ring.wait_ok().epoch
        before = there.bytes_to_target
        tokens = ring.tokens(prompt, 8)
        assert tokens == greedy(model, prompt, 8)[0]
        assert there.bytes_to_target - before >= 8 * 64 * 4  # hidden states
        there.cut()
        ring.wait_status(lambda status: status.status != "ok")
        there.mend()
        ring.wait_status(lambda status: status.status == "ok" and status.epoch > epoch)
        assert ring.tokens(prompt, 8) == tokens
