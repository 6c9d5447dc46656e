"""Many requests over one stream of the head: each has its own tokens and its own end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType

import grpc
import pytest

from cluster.client import Client
from cluster.conversation import Conversation
from cluster.instructions import Emit
from proto import head_pb2, head_pb2_grpc, ring_pb2
from tests.scripted_ring import ScriptedRing
from tests.waiting import wait_for

TIMEOUT_S = 20.0


class Caller:
    """The other end of one Converse call."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._asks: SimpleQueue[head_pb2.Ask | None] = SimpleQueue()
        stub = head_pb2_grpc.HeadStub(self._channel)
        self.call = stub.Converse(iter(self._asks.get, None), timeout=TIMEOUT_S)

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call.cancel()
        self._asks.put(None)
        self._channel.close()

    def ask(self, request_id: str, max_tokens: int, prompt: tuple[int, ...] = (1, 2)) -> None:
        request = head_pb2.GenerateRequest(request_id=request_id, prompt=prompt, max_tokens=max_tokens)
        self._asks.put(head_pb2.Ask(generate=request))

    def leave(self, request_id: str, *, is_finished: bool = False) -> None:
        left = head_pb2.CancelRequest(request_id=request_id, is_finished=is_finished)
        self._asks.put(head_pb2.Ask(leave=left))

    def until_ended(self, count: int) -> dict[str, list[head_pb2.Answer]]:
        """All answers by id, until so many have ended."""
        told: dict[str, list[head_pb2.Answer]] = {}
        ended = 0
        for message in self.call:
            for answer in message.answers:
                told.setdefault(answer.request_id, []).append(answer)
                ended += bool(answer.code or answer.reply.finish_reason)
            if ended >= count:
                break
        return told


def text(answers: list[head_pb2.Answer]) -> bytes:
    return bytes(token.id for answer in answers for token in answer.reply.tokens)


def codes(ring: ScriptedRing) -> dict[str, int]:
    status = head_pb2.ClusterStatus()
    ring.head.fill(status)
    return {error.kind: error.count for error in status.errors if error.count}


@pytest.fixture
def ring() -> Iterator[ScriptedRing]:
    others = set(threading.enumerate())  # of a ring that all tests share
    ring = ScriptedRing()
    yield ring
    ring.close()
    wait_for(lambda: all(t.name != "conversation" or t in others for t in threading.enumerate()), 3.0)


def test_each_gets_its_own(ring: ScriptedRing) -> None:
    with Caller(ring.port) as caller:
        for i in range(4):
            caller.ask(f"r{i}", 5 + i)
        told = caller.until_ended(4)
    assert {name: text(answers) for name, answers in told.items()} == {
        f"r{i}": b"Hello, world."[: 5 + i] for i in range(4)
    }
    last = told["r2"][-1].reply
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", 2, 7)
    assert told["r2"][0].reply.prefill_ms > 0
    ring.wait_empty()
    assert codes(ring) == {}


def test_what_waits_goes_in_one_message() -> None:
    clients: list[Client] = []
    conversation = Conversation(lambda client, _: clients.append(client), lambda _: None, lambda _: None)
    asks = [
        head_pb2.Ask(generate=head_pb2.GenerateRequest(request_id=name, prompt=[1], max_tokens=9))
        for name in "abc"
    ]
    for ask in asks:
        conversation._open(ask.generate)
    for i, client in enumerate(clients):
        client.put(Emit(client.request_id, ring_pb2.SampledToken(id=i), "", 1, 2))
    message = next(conversation.answers())
    assert [(answer.request_id, answer.reply.tokens[0].id) for answer in message.answers] == [
        ("a", 0),
        ("b", 1),
        ("c", 2),
    ]


def test_a_refusal_ends_one_request_and_not_the_stream(ring: ScriptedRing) -> None:
    with Caller(ring.port) as caller:
        caller.ask("wrong", 3, prompt=())
        caller.ask("", 3)
        caller.ask("right", 3)
        told = caller.until_ended(3)
    (wrong,), (nameless,) = told["wrong"], told[""]
    assert (wrong.code, wrong.message) == (
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        "the prompt is empty; send at least one token",
    )
    assert nameless.message == "request id '' is empty or already running; choose another"
    assert text(told["right"]) == b"Hel"


def test_who_leaves_is_told_nothing_more_and_is_freed(ring: ScriptedRing) -> None:
    ring.delay_s = 0.005
    with Caller(ring.port) as caller:
        caller.ask("long", 400)
        caller.ask("enough", 400)
        seen: set[str] = set()
        for message in caller.call:
            seen.update(answer.request_id for answer in message.answers)
            if seen == {"long", "enough"}:
                break
        caller.leave("long")
        caller.leave("enough", is_finished=True)
        caller.leave("nobody")
        ring.wait_empty()
        caller.ask("next", 2)
        assert text(caller.until_ended(1)["next"]) == b"He"
    assert codes(ring) == {"cancelled": 1}


def test_a_request_can_be_cancelled_by_somebody_else(ring: ScriptedRing) -> None:
    ring.delay_s = 0.005
    with Caller(ring.port) as caller, grpc.insecure_channel(f"127.0.0.1:{ring.port}") as channel:
        caller.ask("mine", 400)
        next(caller.call)
        assert head_pb2_grpc.HeadStub(channel).Cancel(head_pb2.CancelRequest(request_id="mine")).found
        told = caller.until_ended(1)["mine"][-1]
    assert (told.code, told.message) == (grpc.StatusCode.CANCELLED.value[0], "the request was cancelled")


def test_a_caller_that_goes_away_frees_all_it_asked(ring: ScriptedRing) -> None:
    ring.delay_s = 0.005
    with Caller(ring.port) as caller:
        for i in range(5):  # one of them waits
            caller.ask(f"r{i}", 400)
        next(caller.call)
        ring.wait_asked(5)
    ring.wait_empty()
    wait_for(lambda: codes(ring) == {"cancelled": 5}, 3.0)


def test_a_head_that_stops_tells_all_and_ends_the_stream() -> None:
    ring = ScriptedRing()
    ring.delay_s = 0.005
    with Caller(ring.port) as caller:
        caller.ask("a", 400)
        caller.ask("b", 400)
        next(caller.call)
        ring.wait_asked(2)
        ring.head.close()
        told = caller.until_ended(2)
        assert all("the head is stopping" in told[name][-1].message for name in "ab")
        assert list(caller.call) == []
    ring.close()
