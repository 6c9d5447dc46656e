"""Long and short requests side by side: who shares frames with whom; padding stays in the plan's room."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.instructions import Instruction, Send
from cluster.lanes import MAX_LANES, Lane, join, lanes_of, taken
from cluster.room import Limits
from cluster.scheduler import Scheduler
from planner.kv_profile import KV_STEP_TOKENS
from proto import ring_pb2
from tests.engine_ring import EngineRing
from tests.reference import greedy
from tests.tiny_models import write_checkpoint

CONTEXT = 1000
ROOM = 4


def test_all_share_a_lane_while_half_of_the_room_is_enough() -> None:
    lanes: dict[int, Lane] = {}
    for share, expected in ((0.5, 0.5), (0.1, 1.0), (0.1, 1.5), (0.1, 2.0)):
        number, after = join(lanes, share, ROOM)
        assert (number, after) == (0, pytest.approx(expected))
        lanes[0] = lanes.get(0, Lane()).and_one(share)
    number, after = join(lanes, 0.1, ROOM)
    assert (number, after) == (1, pytest.approx(2.1))  # not padded to five times its size


def test_who_is_like_those_of_a_lane_joins_it_and_there_are_few_lanes() -> None:
    lanes = lanes_of([(0, 1.0), (0, 0.9), (1, 0.1)])
    assert taken(lanes) == pytest.approx(2.1)
    assert join(lanes, 0.6, ROOM) == (0, pytest.approx(3.1))
    assert join(lanes, 0.15, ROOM) == (1, pytest.approx(2.3))
    assert join(lanes, 0.02, ROOM)[0] == 2
    full = {0: Lane(3, 1.0), 1: Lane(1, 0.4)}
    assert join(full, 0.3, ROOM) == (1, pytest.approx(3.8))
    assert join({0: Lane(7, 0.5)}, 0.4, ROOM) == (0, pytest.approx(4.0))
    assert join({0: Lane(7, 0.52)}, 0.36, ROOM) == (1, pytest.approx(4.0))  # as one of them it had no room
    many = {number: Lane(2, 0.5 / 4**number) for number in range(MAX_LANES)}
    assert join(many, 0.001, 1.0)[0] == MAX_LANES - 1
    assert join({0: Lane(1, 1.0), 2: Lane(1, 0.5)}, 0.01, 1.0)[0] == 1


class Ring:
    """The scheduler before stages that keep what the frames' rows are merged with."""

    def __init__(self, max_rows: int = 8) -> None:
        self.scheduler = Scheduler(max_queued=1000)
        self.sent: list[ring_pb2.Frame] = []
        self.lengths: dict[int, int] = {}  # of caches, by session
        self.merged: dict[int, frozenset[int]] = {}  # with whom a session is merged
        self.most_taken, self.num_rows = 0.0, 0
        share = lambda tokens: max(tokens, 16) / CONTEXT  # noqa: E731
        limits = Limits(CONTEXT, ROOM, 4, 64, max_rows=max_rows, reads_together=True, share=share)
        self.scheduler.ring_up(1, limits)

    def submit(self, name: str, num_prompt: int, max_tokens: int) -> None:
        self._note(self.scheduler.submit(name, [1] * num_prompt, max_tokens, ring_pb2.Sampling()))

    def turn(self) -> None:
        """The first frame comes back."""
        frame = self.sent.pop(0)
        for number in frame.closes:
            del self.lengths[number]
        rows = frozenset(slot.session for slot in frame.slots)
        for slot in frame.slots:
            self.lengths[slot.session] = slot.position + len(slot.tokens)
            self.merged[slot.session] = rows
        self.num_rows = max(self.num_rows, len(rows))
        padded = (
            max(self.lengths[other] for other in self.merged[number] if other in self.lengths)
            for number in self.lengths
        )
        self.most_taken = max(self.most_taken, sum(max(tokens, 16) for tokens in padded) / CONTEXT)
        slots = [
            ring_pb2.Slot(session=s.session, is_sampled=s.is_sampled, result=ring_pb2.SampledToken(id=5))
            for s in frame.slots
        ]
        if slots:
            self._note(self.scheduler.on_result(1, frame.seq, slots))

    def _note(self, instructions: list[Instruction]) -> None:
        self.sent += [i.frame for i in instructions if isinstance(i, Send)]


def test_a_long_request_leaves_short_ones_their_room() -> None:
    ring = Ring()
    ring.submit("long", 10, 900)
    for i in range(16):
        ring.submit(str(i), 10, 110)
    assert ring.scheduler.num_active == 17  # all of one length they would be 4
    while ring.scheduler.num_active == 17:
        ring.turn()
    lanes = {request.lane for request in ring.scheduler.requests}
    assert len(lanes) == 2
    assert ring.num_rows > 4


def test_without_rows_that_share_frames_each_takes_what_it_needs() -> None:
    ring = Ring(max_rows=1)
    for i in range(3):
        ring.submit(f"long {i}", 10, 990)
    for i in range(10):
        ring.submit(str(i), 10, 90)
    assert ring.scheduler.num_active == 13
    ring.submit("more", 10, 1)
    assert ring.scheduler.num_queued == 1


@pytest.mark.parametrize("seed", range(8))
def test_padding_stays_in_the_room_of_the_plan(seed: int) -> None:
    draws = random.Random(seed)
    ring = Ring()
    longest = [draws.choice((20, 100, 400, 900)) for _ in range(60)]
    for i, most in enumerate(longest):
        num_prompt = draws.randrange(1, most)
        ring.submit(str(i), num_prompt, draws.randrange(1, most - num_prompt + 1))
        for _ in range(draws.randrange(40)):
            if ring.sent:
                ring.turn()
    while ring.sent:
        ring.turn()
    assert not ring.scheduler.requests
    assert 1.0 < ring.most_taken <= ROOM
    assert ring.num_rows > 1


def test_answers_stay_the_same_and_caches_in_the_room(tmp_path: Path) -> None:
    """On real caches, which grow by whole steps and are padded as rows of a frame are."""
    num_layers, context, room = 3, 4 * KV_STEP_TOKENS, 2
    model = write_checkpoint("llama", tmp_path / "model", num_layers=num_layers)
    ring = EngineRing(model, (1,), num_layers, context=context, room=room)

    def share(tokens: int) -> float:
        return -(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS / context

    ring.scheduler.ring_up(1, replace(ring.limits, share=share))
    prompts = {"long": ([7, 8, 9] * 174, 30)} | {str(i): ([i + 1, 5, 6], 20) for i in range(4)}
    for name, (prompt, max_tokens) in prompts.items():
        ring.submit(name, prompt, max_tokens)
    assert ring.scheduler.num_active == len(prompts)  # all of one length they would be two
    ring.run()
    for name, (prompt, max_tokens) in prompts.items():
        assert ring.answers[name] == greedy(model, prompt, max_tokens)[0], name
    for engine, layers in zip(ring.engines, (1, 2), strict=True):
        whole_bytes = context * layers * 2 * 2 * 16 * 4  # keys and values of two heads of 16, float32
        assert 0.5 * whole_bytes < engine.memory.peak_kv_bytes <= 1.001 * room * whole_bytes
    ring.check()
