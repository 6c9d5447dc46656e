from __future__ import annotations

from cluster.outbox import Outbox
from cluster.request import Request
from proto import ring_pb2


def writing(session: int) -> Request:
    """A request whose prompt was read, with its last token due."""
    request = Request(f"r{session}", session, [1, 2, 3], 50, ring_pb2.Sampling(), frozenset())
    request.num_sent, request.is_open = 2, True
    return request


def told(outbox: Outbox, *requests: Request) -> list[int]:
    """The sessions of a frame of these, each of which then has a token more."""
    frame = outbox.rows(requests)
    for request in requests:
        request.written.append(7)
    assert outbox.take(frame.seq) == tuple(slot.session for slot in frame.slots)
    return [slot.session for slot in frame.slots]


def test_rows_keep_their_places_and_who_is_new_comes_last() -> None:
    """The stages' rows stand like that: with any other order they would have to be copied."""
    outbox = Outbox()
    one, two, three, four, five = map(writing, range(1, 6))
    assert told(outbox, two, three) == [2, 3]
    assert told(outbox, three, one, two) == [2, 3, 1]
    assert told(outbox, four, five) == [4, 5]
    assert told(outbox, five, one, two) == [2, 1, 5]  # the older frame's rows first
    lone = outbox.lone(two, (), 0)
    assert [slot.session for slot in lone.slots] == [2]
    two.written.append(7)
    assert told(outbox, two, one, five) == [1, 5, 2]  # who was by itself is new
