"""The states that a request goes through."""

from __future__ import annotations

from cluster.instructions import Instruction, Send
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2


def sent(instructions: list[Instruction]) -> list[ring_pb2.Frame]:
    return [one.frame for one in instructions if isinstance(one, Send)]


def test_a_request_waits_then_its_prompt_is_read_then_its_answer_is_written() -> None:
    scheduler = Scheduler(max_queued=2)
    scheduler.ring_up(1, Limits(context=100, max_active=1, max_in_flight=1, prefill_chunk=3))
    prompt = list(range(6))
    (frame,) = sent(scheduler.submit("a", prompt, 5, ring_pb2.Sampling()))
    scheduler.submit("b", prompt, 5, ring_pb2.Sampling())
    a, b = scheduler.requests
    assert [(r.request_id, r.state, r.num_sent) for r in (a, b)] == [("a", "prefill", 3), ("b", "queued", 0)]
    while a.state == "prefill":
        for slot in frame.slots:
            slot.result.id = 7
        (frame,) = sent(scheduler.on_result(1, frame.seq, frame.slots))
    assert (a.state, a.num_completion, b.state) == ("decode", 1, "queued")
    scheduler.cancel("a")
    assert [(r.request_id, r.state) for r in scheduler.requests] == [("b", "prefill")]


def test_a_broken_ring_has_no_requests() -> None:
    scheduler = Scheduler(max_queued=2)
    scheduler.ring_up(1, Limits(context=100, max_active=1, max_in_flight=1))
    scheduler.submit("a", [1, 2], 5, ring_pb2.Sampling())
    assert len(scheduler.requests) == 1
    scheduler.ring_down("rank 1 is gone")
    assert scheduler.requests == []
