"""Telling nodes of an epoch: over real gRPC, and never waiting for one that does not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import grpc
import pytest

from cluster.assigner import ASSIGN_AGAIN_S, Assigner
from cluster.config import NodeConfig
from cluster.membership import Member
from cluster.rpc import make_server
from proto import control_pb2, control_pb2_grpc
from tests.waiting import is_in_time

WAIT_S = 10.0


class Taker(control_pb2_grpc.ControlServicer):
    """A node that answers Assign as it is told to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.reply = control_pb2.AssignReply(accepted=True)

    def Assign(  # noqa: N802
        self, request: control_pb2.AssignRequest, context: grpc.ServicerContext
    ) -> control_pb2.AssignReply:
        self.asked.append(request.epoch)
        return self.reply


@pytest.fixture
def taker() -> Iterator[tuple[Taker, Member]]:
    node = Taker()
    add: Callable[[grpc.Server], None] = lambda server: (  # noqa: E731
        control_pb2_grpc.add_ControlServicer_to_server(node, server)
    )
    server, port = make_server("127.0.0.1:0", [add], None, max_workers=4)
    server.start()
    yield node, member(port)
    server.stop(0).wait(10.0)


def member(port: int) -> Member:
    node = NodeConfig(rank=1, name="n1", host="127.0.0.1", port=port)
    return Member(1, node, status=control_pb2.NodeStatus(rank=1, incarnation=9))


class Asking:
    """An assigner that a test's thread drives."""

    def __init__(self) -> None:
        self.replies: SimpleQueue[None] = SimpleQueue()
        self.assigner = Assigner(None, lambda: self.replies.put(None))

    def ask(self, one: Member, epoch: int = 1, now: float = 0.0) -> None:
        self.assigner.send([one], control_pb2.AssignRequest(epoch=epoch), now)

    def collect(self) -> None:
        self.replies.get(timeout=WAIT_S)
        self.assigner.collect()


@pytest.fixture
def asking() -> Iterator[Asking]:
    one = Asking()
    yield one
    one.assigner.begin()


def test_a_node_that_accepts_has_joined(taker: tuple[Taker, Member], asking: Asking) -> None:
    node, one = taker
    asking.ask(one)
    assert not asking.assigner.has_joined(1)
    assert not asking.assigner.is_due(1, 100.0)  # it is being asked
    asking.collect()
    assert asking.assigner.has_joined(1)
    assert asking.assigner.joined[1].incarnation == 9
    assert not asking.assigner.is_due(1, ASSIGN_AGAIN_S / 2)
    assert asking.assigner.is_due(1, 2 * ASSIGN_AGAIN_S)
    asking.assigner.begin()
    assert not asking.assigner.has_joined(1)
    assert asking.assigner.is_due(1, 0.0)
    assert node.asked == [1]


def test_a_refusal_keeps_its_sentence(taker: tuple[Taker, Member], asking: Asking) -> None:
    node, one = taker
    node.reply = control_pb2.AssignReply(reason="n1 is stopping")
    asking.ask(one)
    asking.collect()
    assert not asking.assigner.has_joined(1)
    assert asking.assigner.joined[1].reason == "n1 is stopping"
    assert not asking.assigner.is_overtaken


def test_a_node_in_a_later_epoch_is_noticed(taker: tuple[Taker, Member], asking: Asking) -> None:
    node, one = taker
    node.reply = control_pb2.AssignReply(reason="epoch 1 is over; n1 is in epoch 5", is_overtaken=True)
    asking.ask(one)
    asking.collect()
    assert asking.assigner.is_overtaken
    asking.assigner.begin()
    assert not asking.assigner.is_overtaken


def test_a_node_that_is_not_there_is_only_not_joined(asking: Asking) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    asking.ask(member(port))
    asking.collect()
    assert not asking.assigner.has_joined(1)
    assert asking.assigner.joined[1].reason == ""


def test_a_mute_node_holds_nobody_up(taker: tuple[Taker, Member], asking: Asking) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        before = time.monotonic()
        asking.ask(member(mute.getsockname()[1]), epoch=1)
        asking.assigner.begin()  # the next epoch comes before it answered
        asking.ask(taker[1], epoch=2)
        assert is_in_time(time.monotonic() - before, 1.0)
        asking.replies.get(timeout=WAIT_S)  # the first call, cancelled
        asking.collect()
    assert asking.assigner.has_joined(1)
    assert taker[0].asked == [2]
