"""The compute thread's queue: who brings the frame that the device waits for lets its step begin."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.awaited import Awaited
from cluster.inbox import Inbox
from cluster.work import StepWork, TrimWork
from proto import ring_pb2
from proto.codec import Tensor

CARRY = Tensor("float32", (1, 1, 2), bytes(8))
Begun = list[tuple[list[int], Sequence[Tensor]]]


def frame(tokens: Sequence[int] = (7,), **rest: object) -> ring_pb2.Frame:
    whole = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=3, seq=9)
    slot = {"session": 1, "position": 5, "is_sampled": True, "num_tensors": 1} | rest
    whole.slots.add(tokens=tokens, **slot)  # type: ignore[arg-type]
    return whole


def step(whole: ring_pb2.Frame, tensors: Sequence[Tensor] = (CARRY,)) -> StepWork:
    return StepWork(whole, tensors, lambda: None)


def awaited(begun: Begun) -> Awaited:
    kind = (CARRY.dtype, CARRY.shape)
    return Awaited(3, 1, 5, (kind,), "", 100, lambda tokens, carry: begun.append(([*tokens], carry)))


def test_its_frame_begins_it_once() -> None:
    inbox, begun = Inbox(), Begun()
    inbox.expect(awaited(begun))
    first = step(frame())
    inbox.put(first)
    inbox.put(first)
    assert begun == [([7], (CARRY,))]
    assert [inbox.get(), inbox.get()] == [first, first]


def test_what_comes_first_ends_the_waiting() -> None:
    inbox, begun = Inbox(), Begun()
    inbox.expect(awaited(begun))
    inbox.put(TrimWork())
    inbox.put(step(frame()))
    assert not begun


def test_not_while_something_is_there_that_comes_before_it() -> None:
    inbox, begun = Inbox(), Begun()
    inbox.put(TrimWork())
    inbox.expect(awaited(begun))
    inbox.put(step(frame()))
    assert not begun


def others() -> dict[str, StepWork]:
    found = {
        "another session": step(frame(session=2)),
        "another position": step(frame(position=6)),
        "two tokens": step(frame((7, 8))),
        "a part of a prompt": step(frame(is_sampled=False)),
        "a token that there is none of": step(frame((100,))),
        "a failed one": step(frame(error="it failed")),
        "another structure": step(frame(structure="[*]")),
        "no carry": step(frame(), ()),
        "another shape": step(frame(), (Tensor("float32", (1, 2, 1), bytes(8)),)),
        "another epoch": step(frame()),
        "one of two": step(frame()),
        "one that opens": step(frame()),
        "one that closes": step(frame()),
        "one that keeps": step(frame()),
        "one that forks": step(frame()),
    }
    found["another epoch"].frame.epoch = 4
    found["one of two"].frame.slots.add(session=2, position=5, tokens=[1], is_sampled=True)
    found["one that opens"].frame.opens.add(session=3)
    found["one that closes"].frame.closes.append(1)
    found["one that keeps"].frame.keeps.append(1)
    found["one that forks"].frame.forks.add(session=4, from_session=1)
    return found


@pytest.mark.parametrize("name", others())
def test_no_other_frame_begins_it(name: str) -> None:
    inbox, begun = Inbox(), Begun()
    inbox.expect(awaited(begun))
    work = others()[name]
    inbox.put(work)
    assert not begun
    assert inbox.get() is work
