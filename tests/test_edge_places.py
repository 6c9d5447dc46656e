"""An edge to a peer with several addresses: it tries them in turn, and the config's own has the last word."""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from cluster import edge_sender
from cluster.ring import NOT_ASSIGNED
from cluster.rpc import make_server
from tests.edges import WAIT_S, free_port, receiving, sending
from tests.relay import Relay
from tests.waiting import wait_for


def test_the_first_place_that_answers_is_used() -> None:
    with receiving() as other, receiving() as receiver:
        places = [f"127.0.0.1:{free_port()}", other.address, receiver.address]
        with sending(receiver.address, places=places) as sender:
            sender.up()
            assert sender.edge.place.address == other.address
            assert sender.edge.to_rank == 2


def test_a_place_that_swallows_everything_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_sender, "CONNECT_LIMIT_S", 0.3)
    with receiving() as receiver, Relay(("127.0.0.1", receiver.port)) as relay:
        relay.stall()
        with sending(receiver.address, places=[relay.address, receiver.address]) as sender:
            sender.up()
            assert relay.bytes_to_target == 0
            assert sender.edge.place.address == receiver.address
            assert sender.refusals.empty()


def test_only_the_configured_place_can_refuse_for_good() -> None:
    stranger, port = make_server("127.0.0.1:0", [], "another token", max_workers=2)
    stranger.start()
    with (
        receiving(accept=lambda _hello: "rank 1 runs with another plan") as receiver,
        sending(receiver.address, places=[f"127.0.0.1:{port}", receiver.address]) as sender,
    ):
        reason = sender.refusals.get(timeout=WAIT_S)
        assert reason == f"rank 2 at {receiver.address} refused the edge: rank 1 runs with another plan"
    stranger.stop(0).wait(10.0)


def test_a_place_that_asks_to_wait_is_not_left() -> None:
    answers: SimpleQueue[str | None] = SimpleQueue()
    for answer in (NOT_ASSIGNED, NOT_ASSIGNED, None):
        answers.put(answer)
    with receiving(accept=lambda _hello: answers.get(timeout=10)) as better, receiving() as receiver:
        with sending(receiver.address, places=[better.address, receiver.address]) as sender:
            sender.up()
            assert sender.edge.place.address == better.address
        assert receiver.downs.empty()


def test_all_places_are_tried_again() -> None:
    port = free_port()
    with sending(f"127.0.0.1:{port}", places=[f"127.0.0.1:{free_port()}", f"127.0.0.1:{port}"]) as sender:
        wait_for(lambda: f":{port}: " in sender.edge.waiting_for, WAIT_S)
        with receiving(port=port):
            sender.up()
            assert sender.edge.place.address == f"127.0.0.1:{port}"
