"""Which prompts are read in one frame, and how many tokens of each."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from cluster.instructions import Emit, Fail, Instruction, Send, Start
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from tests.benchmarks.burst import reckon

CHUNK, SHARED = 64, 16


def limits(*, max_rows: int = 8, max_in_flight: int = 4, reads_together: bool = True) -> Limits:
    return Limits(
        10**4,
        64,
        max_in_flight,
        CHUNK,
        max_chunks=max_in_flight,
        max_rows=max_rows,
        vocab_size=10**6,
        shared_chunk=SHARED,
        reads_together=reads_together,
    )


@dataclass
class Asked:
    prompt: list[int]
    adapter: str = ""
    is_scored: bool = False
    grammar: str = ""
    num_sent: int = 0
    num_written: int = 0
    is_done: bool = False

    @property
    def is_plain(self) -> bool:
        return not (self.is_scored or self.grammar)

    @property
    def is_read(self) -> bool:
        return self.num_sent == len(self.prompt)


@dataclass
class Ring:
    """Frames in the order in which they come back; every frame that is sent is looked at."""

    limits: Limits = field(default_factory=limits)
    asked: dict[int, Asked] = field(default_factory=dict)  # by session
    names: dict[str, int] = field(default_factory=dict)
    sent: deque[ring_pb2.Frame] = field(default_factory=deque)
    chunks: list[ring_pb2.Frame] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    num_without_oldest: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(max_queued=1000)
        self.scheduler.ring_up(1, self.limits)

    def submit(self, num_prompt: int, num_answer: int = 5, priority: int = 0, **wishes: str | bool) -> str:
        number = len(self.names) + 1
        asked = Asked([1000 * number + i for i in range(num_prompt)], **wishes)  # type: ignore[arg-type]
        sampling = ring_pb2.Sampling(prompt_logprobs=asked.is_scored, grammar=asked.grammar)
        self.asked[number], self.names[str(number)] = asked, number
        self._note(
            self.scheduler.submit(
                str(number), asked.prompt, num_answer, sampling, asked.adapter, priority=priority
            )
        )
        return str(number)

    def cancel(self, name: str) -> None:
        self.asked[self.names[name]].is_done = True
        self._note(self.scheduler.cancel(name))

    def turn(self, fails: int = 0) -> ring_pb2.Frame:
        """The first one comes back; fails: a session for which it went wrong."""
        frame = self.sent.popleft()
        slots = [
            ring_pb2.Slot(
                session=slot.session,
                is_sampled=slot.is_sampled,
                result=ring_pb2.SampledToken(id=5) if slot.is_sampled else None,
                error="broken" if slot.session == fails else "",
            )
            for slot in frame.slots
        ]
        self._note(self.scheduler.on_result(frame.epoch, frame.seq, slots))
        return frame

    def finish(self) -> None:
        for _ in range(10**5):
            if not self.sent:
                return
            self.turn()
        raise AssertionError("they do not come to an end")

    def _note(self, instructions: list[Instruction]) -> None:
        for one in instructions:  # what ended comes before what is sent then
            if isinstance(one, Emit) and one.finish_reason:
                self.asked[self.names[one.request_id]].is_done = True
            elif isinstance(one, Fail):
                self.asked[self.names[one.request_id]].is_done = True
                self.failed.append(one.request_id)
            elif isinstance(one, Start):
                self.started.append(one.request_id)
            elif isinstance(one, Send) and one.frame.slots:
                self._look(one.frame)
                self.sent.append(one.frame)

    def _look(self, frame: ring_pb2.Frame) -> None:
        rows = [self.asked[slot.session] for slot in frame.slots]
        assert len(rows) <= self.limits.max_rows
        assert frame.is_batched == (len(rows) > 1)
        assert len({row.adapter for row in rows}) == 1
        assert len({len(slot.tokens) for slot in frame.slots}) == 1
        assert len({slot.is_sampled for slot in frame.slots}) == 1
        new = {slot.session for slot in frame.slots if slot.position == 0}
        assert {spec.session for spec in frame.opens} == new
        assert all(str(session) in self.started for session in new)
        if any(row.num_sent < len(row.prompt) - 1 for row in rows) or new:
            self._look_at_chunk(frame, rows)
        for slot, row in zip(frame.slots, rows, strict=True):
            if not row.is_read:
                assert slot.position == row.num_sent
                assert list(slot.tokens) == row.prompt[row.num_sent : row.num_sent + len(slot.tokens)]
                row.num_sent += len(slot.tokens)

    def _look_at_chunk(self, frame: ring_pb2.Frame, rows: list[Asked]) -> None:
        running = {number: asked for number, asked in self.asked.items() if not asked.is_done}
        is_written = any(asked.num_sent >= len(asked.prompt) - 1 > 0 for asked in running.values())
        most = SHARED if is_written else CHUNK
        assert sum(len(slot.tokens) for slot in frame.slots) <= most
        assert len(rows) == 1 or all(row.is_plain for row in rows)
        positions = [slot.position for slot in frame.slots]
        assert max(positions) - min(positions) <= 2 * CHUNK
        due = [n for n, asked in running.items() if asked.num_sent < max(1, len(asked.prompt) - 1)]
        oldest = min(due)
        self.num_without_oldest += 1
        if any(slot.session == oldest for slot in frame.slots):
            self.num_without_oldest = 0
        assert self.num_without_oldest <= 1
        self.chunks.append(frame)


def lengths(frame: ring_pb2.Frame) -> list[int]:
    return [len(slot.tokens) for slot in frame.slots]


def waiting(*prompts: int, max_rows: int = 8, max_in_flight: int = 1, **wishes: str | bool) -> Ring:
    """These came while the ring was busy with a prompt whose client has left, and are due now."""
    ring = Ring(limits(max_rows=max_rows, max_in_flight=max_in_flight))
    ring.submit(CHUNK + 1)
    for num_prompt in prompts:
        ring.submit(num_prompt, **wishes)  # type: ignore[arg-type]
    ring.cancel("1")
    while any(slot.session == 1 for frame in ring.sent for slot in frame.slots):
        ring.turn()
    return ring


def read(ring: Ring, num_frames: int) -> list[list[int]]:
    """How many tokens of each row the next frames have."""
    return [lengths(ring.turn()) for _ in range(num_frames)]


def test_a_burst_of_equal_prompts_is_one_frame_and_so_are_their_last_tokens() -> None:
    ring = waiting(9, 9, 9, 9)
    assert read(ring, 2) == [[8] * 4, [1] * 4]
    ring.finish()
    assert not ring.failed


def test_their_last_tokens_do_not_wait_for_the_frame_before() -> None:
    ring = waiting(9, 9, 9, 9, max_in_flight=2)
    assert [lengths(frame) for frame in ring.sent] == [[8] * 4, [1] * 2]  # spread over both frames
    ring.finish()


def test_prompts_of_one_token_are_drawn_together() -> None:
    ring = waiting(1, 1, 9, 1)
    assert read(ring, 1) == [[1, 1, 1]]
    ring.finish()


def test_no_more_rows_than_may_share_and_no_more_tokens_than_a_chunk() -> None:
    assert read(waiting(*[5] * 6, max_rows=4), 1) == [[4] * 4]
    assert read(waiting(*[31] * 6), 1) == [[30, 30]]
    assert read(waiting(*[41] * 6), 1) == [[40]]
    assert read(waiting(*[9] * 6, max_rows=1), 1) == [[8]]


def test_the_first_one_reads_less_where_more_prompts_have_so_much() -> None:
    ring = waiting(31, 11, 11, 11, 11)
    assert read(ring, 1) == [[10] * 5]
    ring.finish()
    assert read(waiting(31, 11), 1) == [[30]]


def test_what_fills_a_chunk_goes_alone() -> None:
    ring = waiting(CHUNK + 1, 9, 9)
    assert read(ring, 2) == [[CHUNK], [8, 8]]


@pytest.mark.parametrize("wish", [{"is_scored": True}, {"grammar": "{}"}])
def test_what_cannot_share_goes_alone(wish: dict[str, str | bool]) -> None:
    ring = waiting(9, 9, **wish)
    for _ in range(6):
        frame = ring.turn()
        assert len(frame.slots) == 1 or frame.slots[0].is_sampled
    ring.finish()


def test_adapters_do_not_share() -> None:
    ring = waiting(9, 9)
    for adapter in ("a", "b", "a"):
        ring.submit(9, adapter=adapter)
    sizes = sorted(len(frame.slots) for frame in (ring.turn() for _ in range(12)) if frame.opens)
    assert sizes == [1, 2, 2]
    ring.finish()


def test_who_is_far_behind_does_not_pad_the_others() -> None:
    ring = Ring(limits(max_in_flight=1))
    ring.submit(5 * CHUNK + 9)
    for _ in range(4):
        ring.turn()
    ring.submit(9)
    while not any(asked.is_done for asked in ring.asked.values()):
        frame = ring.turn()
        assert len(frame.slots) == 1 or frame.slots[0].is_sampled
    ring.finish()


def test_an_architecture_that_cannot_read_them_together_reads_each_alone() -> None:
    ring = Ring(limits(max_in_flight=1, reads_together=False))
    for _ in range(5):
        ring.submit(9)
    ring.finish()
    assert all(len(frame.slots) == 1 for frame in ring.chunks)


def test_a_lower_priority_goes_first_and_takes_equals_along() -> None:
    ring = Ring(limits(max_in_flight=1))
    ring.submit(CHUNK + 1)
    for priority in (1, 1, 0, 0):
        ring.submit(9, priority=priority)
    ring.cancel("1")
    ring.turn()
    assert {slot.session for slot in ring.sent[0].slots} == {4, 5}
    ring.finish()


def test_one_that_leaves_and_one_that_fails_while_their_frame_is_in_the_ring() -> None:
    ring = waiting(9, 9, 9, 9)
    ring.cancel("3")
    ring.turn(fails=4)
    assert ring.failed == ["4"]
    assert list(ring.sent[0].closes) == [4]
    assert [slot.session for slot in ring.sent[0].slots] == [2, 5]
    ring.finish()
    assert ring.failed == ["4"]


def test_one_that_waits_for_its_grammar_holds_up_nobody_behind_its_prompt() -> None:
    ring = waiting(9, max_in_flight=3, grammar="{}")
    ring.submit(9)
    while ring.sent:
        for frame in ring.sent:
            sessions = {slot.session for slot in frame.slots}
            on_the_way = any(
                not other.slots[0].is_sampled and other.slots[0].session == 2 for other in ring.sent
            )
            assert sessions == {2} or 2 not in sessions or not on_the_way
        ring.turn()


@pytest.mark.parametrize("seed", range(30))
def test_crowds(seed: int) -> None:
    """`Ring` looks at each frame: its size, order and company, and whether the oldest is left out twice."""
    draws = random.Random(seed)
    ring = Ring(limits(max_rows=draws.choice((2, 5, 32)), max_in_flight=draws.choice((1, 2, 4))))
    wishes: list[dict[str, str | bool]] = [
        {},
        {},
        {},
        {"is_scored": True},
        {"grammar": "{}"},
        {"adapter": "a"},
    ]
    longest = draws.choice((12, 60, 400))
    lost: set[str] = set()
    for _ in range(400):
        for _ in range(draws.randrange(6) if draws.random() < 0.1 and len(ring.names) < 50 else 0):
            num_prompt, num_answer = draws.randint(1, longest), draws.randint(1, 12)
            ring.submit(num_prompt, num_answer, draws.randrange(2), **draws.choice(wishes))  # type: ignore[arg-type]
        if draws.random() < 0.02 and ring.names:
            lost.add(name := draws.choice(list(ring.names)))
            ring.cancel(name)
        if ring.sent:
            slots = ring.sent[0].slots
            ring.turn(fails=draws.choice(slots).session if draws.random() < 0.02 else 0)
    ring.finish()
    assert all(asked.is_done for asked in ring.asked.values())
    whole = [a for name, a in zip(ring.names, ring.asked.values(), strict=True) if name not in lost]
    assert all(asked.is_read for asked in whole) or ring.failed
    assert longest > 60 or any(len(frame.slots) > 1 for frame in ring.chunks)


@pytest.mark.parametrize(
    ("prompts", "alone", "together"),
    [([64] * 16, 16, 4), ([5 + 7 * i % 60 for i in range(16)], 16, 8), ([200] * 16, 16, 16)],
)
def test_passes_of_a_burst(prompts: list[int], alone: int, together: int) -> None:
    """As of tests/benchmarks/burst.py; the first frames have left before the others come."""
    found = [
        reckon(
            Limits(10**6, 100, 4, 512, max_chunks=4, max_rows=32, reads_together=rule), 3, 5.0, 0.034, prompts
        )
        for rule in (False, True)
    ]
    assert (found[0].num_frames, found[1].num_frames) == (alone, together)
    assert found[1].first_ms[1] <= found[0].first_ms[1]
