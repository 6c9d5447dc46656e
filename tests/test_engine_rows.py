"""Several sessions in one forward pass: joining, leaving, and each with its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cluster.engine import Engine
from cluster.groups import Groups
from proto import ring_pb2
from proto.ring_pb2 import Frame
from tests.reference import greedy
from tests.test_engine import stages, trip
from tests.tiny_models import write_checkpoint

LAYERS = 5
# By session. The first is longer than the windows of the tiny models.
PROMPTS = {
    1: [72, 101, 108, 108, 111, 44, 32, 119, 3, 14, 15, 92],
    2: [65, 3, 58],
    3: [9, 79, 32, 38, 46, 26],
}


@pytest.fixture(scope="module", params=["llama", "gpt_oss", "mamba2", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_layers=LAYERS)


class Writer:
    """Sessions on a ring of engines, and what each of them has written."""

    def __init__(
        self, ring: Sequence[Engine], sampling: Mapping[int, ring_pb2.Sampling] | None = None
    ) -> None:
        self.ring, self.sampling = ring, sampling or {}
        self.last = {session: prompt[-1] for session, prompt in PROMPTS.items()}
        self.position = {session: len(prompt) - 1 for session, prompt in PROMPTS.items()}
        self.written: dict[int, list[int]] = {session: [] for session in PROMPTS}
        self.seq = 0

    def frame(self, *slots: ring_pb2.Slot, closes: Sequence[int] = ()) -> ring_pb2.Frame:
        self.seq += 1
        is_batched = len(slots) > 1
        return ring_pb2.Frame(
            kind=ring_pb2.STEP, epoch=1, seq=self.seq, slots=slots, closes=closes, is_batched=is_batched
        )

    def read(self, *sessions: int) -> None:
        for session in sessions:
            prompt = PROMPTS[session]
            slot = ring_pb2.Slot(session=session, position=0, tokens=prompt[:-1])
            frame = self.frame(slot)
            sampling = self.sampling.get(session, ring_pb2.Sampling())
            frame.opens.add(session=session, prompt_tokens=len(prompt), max_tokens=30, sampling=sampling)
            trip(self.ring, frame)

    def write(self, *sessions: int, times: int = 1, closes: Sequence[int] = ()) -> ring_pb2.Frame:
        for _ in range(times):
            slots = [
                ring_pb2.Slot(session=s, position=self.position[s], tokens=[self.last[s]], is_sampled=True)
                for s in sessions
            ]
            result = trip(self.ring, self.frame(*slots, closes=closes))
            assert result is not None
            assert [slot.session for slot in result.slots] == list(sessions)
            for slot in result.slots:
                if not slot.error:
                    self.last[slot.session] = slot.result.id
                    self.position[slot.session] += 1
                    self.written[slot.session].append(slot.result.id)
        return result


def test_a_row_that_is_closed_leaves_a_group_that_has_no_frame(model: Path) -> None:
    ring = stages(model, [2])
    writer = Writer(ring)
    writer.read(1, 2, 3)
    writer.write(1, 2, 3)
    before = [Groups.nbytes(engine.sessions.values()) for engine in ring]
    trip(ring, Frame(kind=ring_pb2.STEP, epoch=1, seq=99, closes=[1, 2]))
    after = [Groups.nbytes(engine.sessions.values()) for engine in ring]
    assert all(b <= 0.4 * a for a, b in zip(before, after, strict=True))
    writer.write(3, times=3)
    assert writer.written[3] == greedy(model, PROMPTS[3], 4)[0]


@pytest.mark.parametrize("cuts", [[], pytest.param([2], marks=pytest.mark.long), [1, 4]])
def test_whoever_joins_and_leaves_each_writes_its_own(model: Path, cuts: list[int]) -> None:
    writer = Writer(stages(model, cuts))
    writer.read(1, 2)
    writer.write(1, times=2)
    writer.write(1, 2, times=3)
    writer.read(3)
    writer.write(2, 3, 1, times=2)  # one more, in another order
    writer.write(3, 2, times=2)  # one less, alive
    writer.write(1, times=2)  # by itself again
    writer.write(1, 3, times=2, closes=[2])
    for session, written in writer.written.items():
        assert written == greedy(model, PROMPTS[session], len(written))[0]
    assert [len(writer.written[session]) for session in PROMPTS] == [11, 7, 6]


def test_rows_that_leave_together_stay_together(model: Path) -> None:
    """When answers are spread over more frames, nothing is taken apart to be merged again."""
    writer = Writer(ring := stages(model, [2]))
    writer.read(1, 2, 3)
    writer.write(1, 2, 3, times=2)
    writer.write(2)
    for engine in ring:
        others = {id(engine.sessions[session].group) for session in (1, 3)}
        assert len(others) == 1
        assert None not in (engine.sessions[session].group for session in (1, 3))
        assert engine.sessions[2].group is None
    writer.write(1, 3, times=2)
    writer.write(1, 3, 2, times=2)
    for session, written in writer.written.items():
        assert written == greedy(model, PROMPTS[session], len(written))[0]


def test_one_forward_pass_for_all_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = stages(model, [2])
    writer = Writer(ring)
    writer.read(1, 2, 3)
    shapes = []
    forward = ring[1].shard.forward
    monkeypatch.setattr(
        ring[1].shard, "forward", lambda tokens, *rest: shapes.append(tokens.shape) or forward(tokens, *rest)
    )
    writer.write(1, 2, 3)
    assert shapes == [(3, 1)]


def test_each_row_is_drawn_as_it_asked(model: Path) -> None:
    wishes = {
        1: ring_pb2.Sampling(logprobs=True, top_logprobs=3),
        2: ring_pb2.Sampling(temperature=0.8, seed=11),
        3: ring_pb2.Sampling(frequency_penalty=1.5, logit_bias={7: 2.0}),
    }
    together, alone = Writer(stages(model, [2]), wishes), Writer(stages(model, [2]), wishes)
    together.read(1, 2, 3)
    alone.read(1, 2, 3)
    for _ in range(4):
        result = together.write(1, 2, 3)
        lone = [alone.write(session).slots[0] for session in PROMPTS]
        assert [slot.result.id for slot in result.slots] == [slot.result.id for slot in lone]
        assert result.slots[0].result.logprob == pytest.approx(lone[0].result.logprob, abs=1e-4)
        assert [top.id for top in result.slots[0].result.top] == [top.id for top in lone[0].result.top]


def test_the_last_one_to_close_frees_the_group(model: Path) -> None:
    ring = stages(model, [2])
    writer = Writer(ring)
    writer.read(1, 2)
    writer.write(1, 2, times=2)
    assert trip(ring, writer.frame(closes=[1, 2])) is None
    assert all(not engine.sessions and engine.memory.kv_bytes == 0 for engine in ring)
    writer.read(3)
    writer.write(3, times=3)
    assert writer.written[3] == greedy(model, PROMPTS[3], 3)[0]


def test_a_row_that_cannot_be_fails_alone(model: Path) -> None:
    ring = stages(model, [2])
    writer = Writer(ring)
    writer.read(1, 2, 3)
    writer.write(1, 2, times=2)
    writer.position[2] += 5
    result = writer.write(1, 2)
    errors = {slot.session: slot.error for slot in result.slots}
    assert not errors[1]
    assert "is at position" in errors[2]
    writer.write(1, 3, times=3)
    assert writer.written[1] == greedy(model, PROMPTS[1], 6)[0]
    assert writer.written[3] == greedy(model, PROMPTS[3], 3)[0]
    assert set(ring[0].sessions) == {1, 3}


def test_a_session_begins_as_a_copy_of_another(model: Path) -> None:
    ring = stages(model, [2])
    writer = Writer(ring)
    writer.read(1, 2)
    writer.write(1, 2, times=3)
    known = [*PROMPTS[1], *writer.written[1]][:-1]  # the last one drawn has not been fed
    assert trip(ring, Frame(kind=ring_pb2.STEP, epoch=1, seq=90, keeps=[1], keep_tokens=[len(known)])) is None
    prompt = [*known, 17, 4, 88]
    chunk = writer.frame(ring_pb2.Slot(session=9, position=len(known), tokens=[17, 4]))
    chunk.opens.add(
        session=9, prompt_tokens=len(prompt), max_tokens=9, from_session=1, from_tokens=len(known)
    )
    trip(ring, chunk)
    writer.last[9], writer.position[9], writer.written[9] = 88, len(prompt) - 1, []
    writer.write(9, 2, times=3)
    writer.write(1, times=2)  # the original never felt it
    assert writer.written[9] == greedy(model, prompt, 3)[0]
    assert writer.written[1] == greedy(model, PROMPTS[1], 5)[0]
    assert writer.written[2] == greedy(model, PROMPTS[2], 6)[0]


def test_what_no_copy_can_begin_with_is_refused(model: Path) -> None:
    ring = stages(model, [2])
    writer = Writer(ring)
    writer.read(1)
    for number, (source, num_tokens) in enumerate([(7, 3), (1, 99)], 20):
        frame = writer.frame(ring_pb2.Slot(session=number, position=num_tokens, tokens=[1], is_sampled=True))
        frame.opens.add(
            session=number, prompt_tokens=9, max_tokens=2, from_session=source, from_tokens=num_tokens
        )
        result = trip(ring, frame)
        assert result is not None
        assert "cop" in result.slots[0].error
    writer.write(1, times=2)
    assert writer.written[1] == greedy(model, PROMPTS[1], 2)[0]
