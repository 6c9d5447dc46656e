"""Prompts that are read in one forward pass, the same number of tokens of each: every row is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cluster.engine import Engine
from cluster.groups import Groups
from proto import ring_pb2
from tests.reference import greedy
from tests.test_engine import stages, trip
from tests.tiny_models import write_checkpoint

LAYERS = 5
# By session. The first two are longer than the windows of the tiny models.
PROMPTS = {
    1: [72, 101, 108, 108, 111, 44, 32, 119, 3, 14, 15, 92],
    2: [9, 79, 32, 38, 46, 26, 61, 7, 7, 90, 2, 55],
    3: [65, 3, 58, 4, 12],
    4: [17],
    5: [33],
}


@pytest.fixture(scope="module", params=["llama", "gpt_oss", "mamba2", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_layers=LAYERS)


class Reader:
    """Sessions on a ring of engines: how much of its prompt each has read, and what it has written."""

    def __init__(self, ring: Sequence[Engine], prompts: Mapping[int, list[int]] = PROMPTS) -> None:
        self.ring, self.prompts = ring, dict(prompts)
        self.position = dict.fromkeys(prompts, 0)
        self.known = {session: list(prompt) for session, prompt in prompts.items()}
        self.opened: set[int] = set()
        self.seq = 0

    def go(
        self,
        *sessions: int,
        num_tokens: int = 1,
        forks: Mapping[int, int] | None = None,
        closes: Sequence[int] = (),
        from_session: Mapping[int, tuple[int, int]] | None = None,
    ) -> dict[int, str]:
        """So many known tokens of each in one frame; the errors. forks: by session, its copy's number."""
        self.seq += 1
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=self.seq, is_batched=len(sessions) > 1)
        frame.closes.extend(closes)
        for session in sessions:
            at = self.position[session]
            if session not in self.opened:
                source, begun = (from_session or {}).get(session, (0, 0))
                spec = frame.opens.add(session=session, prompt_tokens=len(self.prompts[session]))
                spec.max_tokens, spec.from_session, spec.from_tokens = 30, source, begun
                self.opened.add(session)
                at = begun
            tokens = self.known[session][at : at + num_tokens]
            assert len(tokens) == num_tokens
            is_sampled = at + num_tokens == len(self.known[session])
            frame.slots.add(session=session, position=at, tokens=tokens, is_sampled=is_sampled)
            self.position[session] = at + num_tokens
        for session, copy in (forks or {}).items():
            frame.forks.add(session=copy, from_session=session)
        result = trip(self.ring, frame)
        assert result is not None
        assert {slot.session for slot in result.slots} == set(sessions)
        for slot in result.slots:
            if slot.is_sampled and not slot.error:
                self.known[slot.session].append(slot.result.id)
        return {slot.session: slot.error for slot in result.slots if slot.error}

    def check(self, model: Path, *sessions: int) -> None:
        """Each has written its lone tokens; one at least."""
        for session in sessions or self.opened:
            prompt = self.prompts[session]
            written = self.known[session][len(prompt) :]
            assert written
            assert written == greedy(model, prompt, len(written))[0]


@pytest.mark.parametrize("cuts", [[], pytest.param([2], marks=pytest.mark.long), [1, 4]])
def test_a_burst_is_read_together_and_writes_together(model: Path, cuts: list[int]) -> None:
    reader = Reader(ring := stages(model, cuts))
    reader.go(1, 2, 3, num_tokens=4)
    reader.go(1, 2, num_tokens=7)  # past every window
    for _ in range(4):
        reader.go(1, 2, 3)
    assert all(engine.stats.num_steps == 6 for engine in ring)
    reader.check(model, 1, 2, 3)


def test_prompts_that_are_not_equally_far(model: Path) -> None:
    reader = Reader(stages(model, [2]))
    reader.go(2, num_tokens=6)
    reader.go(1, 2, 3, num_tokens=2)  # with two that begin
    reader.go(1, 3, num_tokens=1)
    reader.go(1, 3, 2, num_tokens=1)
    reader.go(2, 1, num_tokens=2)
    reader.go(1, num_tokens=5)
    reader.go(3)
    for _ in range(4):
        reader.go(1, 2, 3)
    reader.check(model, 1, 2, 3)


def test_several_that_begin_join_rows_that_have_read(model: Path) -> None:
    reader = Reader(stages(model, [2]), PROMPTS | {6: [71, 5, 28, 9, 64]})
    reader.go(1, 2, num_tokens=6)
    reader.go(1, 2, 3, 6, num_tokens=4)
    reader.go(1, 2)
    for _ in range(4):
        reader.go(1, 2, 3, 6)
    reader.check(model, 1, 2, 3, 6)


def test_one_pass_for_all_prompts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = stages(model, [2])
    reader = Reader(ring)
    shapes = []
    forward = ring[1].shard.forward
    monkeypatch.setattr(
        ring[1].shard, "forward", lambda tokens, *rest: shapes.append(tokens.shape) or forward(tokens, *rest)
    )
    reader.go(1, 2, 3, num_tokens=4)
    reader.go(1, 2, num_tokens=5)
    assert shapes == [(3, 4), (2, 5)]


def test_prompts_of_one_token_begin_together(model: Path) -> None:
    reader = Reader(stages(model, [2]))
    for _ in range(4):
        reader.go(4, 5)
    reader.check(model, 4, 5)


@pytest.mark.parametrize(
    ("at", "victim"),
    [
        pytest.param(at, victim, marks=[] if victim == at + 1 else pytest.mark.long)
        for at in (0, 1, 2)
        for victim in (1, 2, 3)
    ],
)
def test_one_that_a_stage_has_lost_fails_alone(model: Path, at: int, victim: int) -> None:
    """Its chunk may have failed there while this frame was on its way already."""
    reader = Reader(ring := stages(model, [1, 4]))
    reader.go(1, 2, 3, num_tokens=2)
    ring[at].sessions.pop(victim)
    errors = reader.go(1, 2, 3, num_tokens=2)
    assert list(errors) == [victim]
    assert f"session {victim} is not open on this stage" in errors[victim]
    others = [session for session in (1, 2, 3) if session != victim]
    if victim != 3:
        reader.go(3)
    left = [session for session in others if session != 3]
    reader.go(*left, num_tokens=7)
    for i in range(3):
        reader.go(*others, closes=[] if i else [victim])
    reader.check(model, *others)
    trip(ring, ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=99, closes=[1, 2, 3]))
    assert all(Groups.nbytes(engine.sessions.values()) == 0 for engine in ring)


def test_the_row_that_kept_a_place_holds_no_memory_once_its_request_is_closed(model: Path) -> None:
    reader = Reader(ring := stages(model, [2]))
    reader.go(1, 2, num_tokens=2)
    ring[0].sessions.pop(1)
    reader.go(1, 2, num_tokens=2)
    with_two = Groups.nbytes(ring[0].sessions.values())
    trip(ring, ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=99, closes=[1]))
    assert Groups.nbytes(ring[0].sessions.values()) <= 0.55 * with_two
    reader.go(2, num_tokens=7)
    reader.go(2)
    reader.check(model, 2)


def test_all_that_cannot_be_read_say_so(model: Path) -> None:
    reader = Reader(ring := stages(model, [2]))
    reader.go(1, 2, num_tokens=2)
    ring[0].sessions.clear()
    assert set(reader.go(1, 2, num_tokens=2)) == {1, 2}
    reader.go(3, num_tokens=4)
    reader.go(3)
    reader.check(model, 3)


def test_one_that_cannot_begin_fails_alone(model: Path) -> None:
    reader = Reader(stages(model, [2]))
    errors = reader.go(1, 2, 3, num_tokens=4, from_session={2: (77, 3)})
    assert errors == {2: "session 77 is not open on this stage, and has no copy"}
    reader.go(1, num_tokens=7)
    reader.go(1, 3)
    reader.check(model, 1, 3)


def test_copies_that_are_kept_of_rows_leave_the_rows_together(model: Path) -> None:
    prompts = PROMPTS | {9: [*PROMPTS[1][:6], 5, 88, 41], 8: [*PROMPTS[2][:6], 90, 1]}
    reader = Reader(ring := stages(model, [2]), prompts)
    reader.go(1, 2, num_tokens=6, forks={1: 21, 2: 22})
    for engine in ring:
        assert engine.sessions[1].group is engine.sessions[2].group is not None
    reader.go(1, 2, num_tokens=5)
    reader.go(8, 9, num_tokens=1, from_session={9: (21, 6), 8: (22, 6)})
    reader.go(9, num_tokens=1)
    for _ in range(3):
        reader.go(1, 8, 9, 2)
    reader.check(model, 1, 2, 8, 9)
