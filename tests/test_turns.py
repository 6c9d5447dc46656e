"""Whose turn it is: answers alone are spread over the frames, beside a prompt they share as few as can be."""

from __future__ import annotations

import pytest

from cluster.instructions import Instruction, Send
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from tests.benchmarks import turns as reckoned

LONG = 400  # tokens


class Ring:
    """Frames in the order in which they come back."""

    def __init__(self, *, max_rows: int = 8, max_in_flight: int = 4, num_writing: int = 4) -> None:
        self.sent: list[ring_pb2.Frame] = []
        self.scheduler = Scheduler(max_queued=9)
        limits = Limits(
            10**4, 16, max_in_flight, 8, max_chunks=4, max_rows=max_rows, vocab_size=100, shared_chunk=4
        )
        self.scheduler.ring_up(1, limits)
        for i in range(num_writing):
            self.submit(str(i), 1)
        for _ in range(8 * num_writing):
            self.turn()

    def submit(self, name: str, num_prompt: int, adapter: str = "") -> None:
        self._note(self.scheduler.submit(name, [1] * num_prompt, 10**3, ring_pb2.Sampling(), adapter))

    def turn(self) -> ring_pb2.Frame:
        """The first one comes back."""
        frame = self.sent.pop(0)
        slots = [
            ring_pb2.Slot(session=s.session, is_sampled=s.is_sampled, result=ring_pb2.SampledToken(id=5))
            for s in frame.slots
        ]
        self._note(self.scheduler.on_result(frame.epoch, frame.seq, slots))
        return frame

    def turns(self, count: int) -> list[ring_pb2.Frame]:
        return [self.turn() for _ in range(count)]

    def rows(self) -> list[int]:
        """How many answers each frame in flight carries; 0: it is of a prompt."""
        return sorted(len(frame.slots) if frame.slots[0].is_sampled else 0 for frame in self.sent)

    def _note(self, instructions: list[Instruction]) -> None:
        self.sent += [i.frame for i in instructions if isinstance(i, Send) and i.frame.slots]


def test_beside_a_prompt_all_answers_share_a_frame_and_chunks_fill_the_others() -> None:
    ring = Ring()
    assert ring.rows() == [1, 1, 1, 1]
    ring.submit("long", LONG)
    ring.turns(4)
    assert ring.rows() == [0, 0, 0, 4]
    for _ in range(20):
        ring.turn()
        assert ring.rows() == [0, 0, 0, 4]
    read = sum(len(frame.slots[0].tokens) for frame in ring.turns(40) if not frame.slots[0].is_sampled)
    assert read == 30 * 4  # of every four frames three


def test_after_the_prompt_they_are_spread_again() -> None:
    ring = Ring()
    ring.submit("long", 30)
    ring.turns(60)
    assert ring.rows() == [1, 2, 2]


@pytest.mark.parametrize(("max_rows", "rows"), [(1, [0, 1, 1, 1]), (2, [0, 0, 2, 2]), (3, [0, 0, 2, 2])])
def test_as_few_frames_as_can_carry_them(max_rows: int, rows: list[int]) -> None:
    ring = Ring(max_rows=max_rows)
    ring.submit("long", LONG)
    ring.turns(40)
    assert ring.rows() == rows


def test_answers_of_two_adapters_have_a_frame_each() -> None:
    ring = Ring(num_writing=2)
    for name in ("a", "b"):
        ring.submit(name, 1, "warm")
    ring.turns(20)
    ring.submit("long", LONG)
    ring.turns(40)
    assert ring.rows() == [0, 0, 2, 2]


def test_no_answer_waits_longer_than_a_round_of_chunks() -> None:
    ring = Ring()
    ring.submit("long", LONG)
    last = dict.fromkeys(range(1, 5), 0)
    longest = 0
    for at in range(1, 200):
        for slot in ring.turn().slots:
            if slot.session in last:
                longest = max(longest, at - last[slot.session])
                last[slot.session] = at
    assert longest <= 2 * 4 - 1  # the first one waits for the last, once


def test_a_long_prompt_among_answers_costs_them_a_second_gap_at_most_and_is_hardly_slower() -> None:
    """A chunk takes a stage 1.75 times as long as a token of an answer: the plan would choose such."""
    limits = Limits(10**9, 9, 4, 512, max_chunks=4, max_rows=32, shared_chunk=256)
    rings = [reckoned.Ring(limits, 3, 5.0, 5.0 * 1.75 / 256, 0.3) for _ in range(2)]
    found = reckoned.reckon(*rings, users=4, num_prompt=16384)
    assert found.gaps_beside[1] <= 2.0 * found.gaps[1]
    assert found.alone_ms >= 0.8 * found.beside_ms
