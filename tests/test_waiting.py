"""Who starts next, as properties of the scheduler under seeded crowds."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from cluster.instructions import Fail, FailureKind, Instruction, Send, Start
from cluster.room import Limits
from cluster.scheduler import Scheduler
from cluster.waiting import MAX_OVERTAKEN, MAX_PASSED
from proto import ring_pb2

CONTEXT = 64
SEEDS = range(5)
NUM_REQUESTS = 70


def share(tokens: int) -> float:
    """A quarter of the context takes a quarter of the room."""
    return max(tokens / CONTEXT, 1 / 16)


@dataclass
class Crowd:
    """A ring that answers each frame in its turn, and who began when."""

    num_whole: int = 2  # contexts that the plan has room for
    queue_timeout_s: float | None = None
    starts: list[str] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    sent: deque[ring_pb2.Frame] = field(default_factory=deque)
    failed: list[Fail] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(max_queued=10**6, queue_timeout_s=self.queue_timeout_s)
        self.scheduler.ring_up(
            1, Limits(CONTEXT, self.num_whole, 4, 8, max_chunks=4, max_rows=8, share=share)
        )

    def submit(
        self, name: str, num_prompt: int, num_answer: int, priority: int = 0, now_s: float = 0.0
    ) -> None:
        prompt, sampling = [1] * num_prompt, ring_pb2.Sampling()
        self._note(self.scheduler.submit(name, prompt, num_answer, sampling, priority=priority, now_s=now_s))

    def turn(self) -> None:
        """The frame that has been in the ring for longest comes back."""
        frame = self.sent.popleft()
        slots = [
            ring_pb2.Slot(session=s.session, is_sampled=s.is_sampled, result=ring_pb2.SampledToken(id=5))
            for s in frame.slots
        ]
        self._note(self.scheduler.on_result(frame.epoch, frame.seq, slots))

    def expire(self, now_s: float) -> None:
        self._note(self.scheduler.expire(now_s))

    def run(self) -> None:
        """Until nobody is left."""
        while self.sent:
            self.turn()

    def _note(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Send) and instruction.frame.slots:
                self.sent.append(instruction.frame)
            if isinstance(instruction, Fail):
                self.failed.append(instruction)
        # In the order in which they were given room, which is not that of their first chunks.
        active = [r.request_id for r in self.scheduler.requests if r.is_active]
        self.starts += [name for name in active if name not in self.begun]
        self.begun.update(active)


def random_size(rng: random.Random) -> tuple[int, int]:
    return rng.choice([(2, 2), (4, 4), (16, 4), (56, 4), (CONTEXT - 4, 4)])


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_are_served_in_order_but_for_a_few_smaller_ones(seed: int) -> None:
    rng, crowd = random.Random(seed), Crowd()
    for i in range(NUM_REQUESTS):
        crowd.submit(str(i), *random_size(rng))
        for _ in range(rng.choice([0, 0, 1, 5, 20])):
            if crowd.sent:
                crowd.turn()
    crowd.run()
    order = list(map(int, crowd.starts))
    assert sorted(order) == list(range(NUM_REQUESTS))  # all of them ran
    passes = [sum(later > name for later in order[:place]) for place, name in enumerate(order)]
    assert max(passes) <= MAX_PASSED
    assert max(passes) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_waits_for_ever_whatever_comes_before_it(seed: int) -> None:
    """Each start of another is one of at most MAX_OVERTAKEN + 1 for everybody who had waited longer."""
    rng, crowd = random.Random(seed), Crowd()
    seen: dict[str, tuple[int, int]] = {}  # starts so far and who waited, when it came
    for i in range(NUM_REQUESTS):
        num_waiting = crowd.scheduler.num_queued
        seen[str(i)] = len(crowd.starts), num_waiting
        crowd.submit(str(i), *random_size(rng), priority=0 if i % 10 else 9)  # each tenth is in no hurry
        while crowd.scheduler.num_queued > 12:
            crowd.turn()
    crowd.run()
    assert len(crowd.starts) == NUM_REQUESTS
    for place, name in enumerate(crowd.starts):
        started, num_before = seen[name]
        assert place - started <= (MAX_OVERTAKEN + 1) * (num_before + 1)


def test_lower_numbers_start_first() -> None:
    crowd = Crowd(num_whole=1)
    crowd.submit("running", 8, CONTEXT - 8)
    for name, priority in [("a", 0), ("late", 5), ("b", 0), ("soon", -1)]:
        crowd.submit(name, 8, CONTEXT - 8, priority)
    crowd.run()
    assert crowd.starts == ["running", "soon", "a", "b", "late"]


def test_an_endless_stream_of_urgent_ones_lets_the_one_that_waits_longest_through() -> None:
    crowd = Crowd(num_whole=1)
    crowd.submit("first", 8, CONTEXT - 8)
    crowd.submit("patient", 8, CONTEXT - 8, 100)
    for i in range(40):
        crowd.submit(str(i), 8, CONTEXT - 8, -100)
    crowd.run()
    assert crowd.starts.index("patient") == MAX_OVERTAKEN + 1


def test_an_endless_stream_of_small_ones_lets_a_large_one_through() -> None:
    crowd = Crowd()
    crowd.submit("first", 40, 20)
    crowd.submit("large", 8, CONTEXT - 8)
    assert crowd.starts == ["first", "large"]
    crowd.submit("next", 8, CONTEXT - 8)
    for i in range(100):
        crowd.submit(str(i), 2, 2)
    crowd.run()
    assert crowd.starts.index("next") <= 2 + MAX_PASSED


def test_small_ones_start_beside_one_that_has_no_room_yet() -> None:
    """Rows are padded to the longest that runs: there is room for small ones, and none for a large one."""
    crowd = Crowd(num_whole=1)
    crowd.submit("small", 2, 2)
    crowd.submit("large", 8, CONTEXT - 8)
    crowd.submit("small too", 2, 2)
    assert crowd.starts == ["small", "small too"]
    crowd.run()
    assert crowd.starts == ["small", "small too", "large"]


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_other_way_round() -> None:
    crowd = Crowd(num_whole=4)
    crowd.submit("long", 60, 1)
    crowd.submit("short", 9, 1)
    order: list[int] = []
    while crowd.sent:
        order.append(crowd.sent[0].slots[0].session)
        crowd.turn()
    assert order.index(2) <= 5  # 4 frames were under way
    assert order[-1] == 1
    crowd.submit("long", 60, 1)
    for i in range(20):
        crowd.submit(str(i), 17, 1)
    turns: list[int] = []
    while crowd.sent:
        turns.append(crowd.sent[0].slots[0].session)
        crowd.turn()
    long = turns[0]
    last = max(i for i, session in enumerate(turns) if session == long)
    assert last <= 4 * 8  # of 8 chunks, every other is its


# -- the deadline -----------------------------------------------------------------------------------------
def test_who_has_waited_too_long_is_told_so_and_leaves() -> None:
    crowd = Crowd(num_whole=1, queue_timeout_s=5.0)
    crowd.submit("running", 8, CONTEXT - 8, now_s=100.0)
    crowd.submit("large", 8, CONTEXT - 8, now_s=101.0)
    crowd.submit("later", 8, CONTEXT - 8, now_s=103.0)
    crowd.expire(105.9)
    assert not crowd.failed
    crowd.expire(106.0)
    assert crowd.failed == [
        Fail(
            "large",
            FailureKind.LATE,
            "the request waited 5 s for its turn, which is what api.queue_timeout_s allows: "
            "1 requests run and 2 wait; try again later",
        )
    ]
    assert crowd.scheduler.num_queued == 1
    assert crowd.scheduler.counters.num_failed == 1
    crowd.expire(1e9)
    assert [fail.request_id for fail in crowd.failed] == ["large", "later"]
    assert crowd.scheduler.num_active == 1  # what runs is not asked how long it waited
    crowd.run()
    assert crowd.starts == ["running"]


def test_where_one_has_given_up_another_may_find_room() -> None:
    crowd = Crowd(num_whole=1, queue_timeout_s=5.0)
    crowd.submit("running", 2, 2, now_s=100.0)
    crowd.submit("large", 8, CONTEXT - 8, now_s=101.0)
    for i in range(2 * MAX_PASSED):
        crowd.submit(str(i), 2, 2, now_s=104.0)
    assert len(crowd.starts) == 1 + MAX_PASSED
    crowd.expire(107.0)
    assert len(crowd.starts) > 1 + MAX_PASSED


def test_without_a_deadline_they_wait() -> None:
    crowd = Crowd(num_whole=1)
    crowd.submit("running", 8, CONTEXT - 8)
    crowd.submit("waiting", 8, CONTEXT - 8)
    crowd.expire(1e12)
    assert not crowd.failed
    assert not any(isinstance(i, Start) for i in crowd.scheduler.expire(1e13))
