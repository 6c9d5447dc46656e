from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.engine import Engine
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.weights import load_shard
from tests.reference import greedy
from tests.tiny_models import write_checkpoint

LAYERS = 5
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"), num_layers=LAYERS)


def stages(model: Path, cuts: Sequence[int]) -> list[Engine]:
    bounds = [0, *cuts, LAYERS]
    return [Engine(load_shard(model, a, b)) for a, b in itertools.pairwise(bounds)]


def trip(ring: Sequence[Engine], frame: ring_pb2.Frame) -> ring_pb2.Frame | None:
    """Once round: the RESULT, or None."""
    tensors: Sequence[Tensor] = ()
    for engine in ring:
        output = engine.step(frame, tensors)
        if output is None:
            return None
        frame, tensors = output
    return frame


def opening(session: int, sampling: ring_pb2.Sampling | None = None) -> ring_pb2.SessionSpec:
    return ring_pb2.SessionSpec(
        session=session,
        prompt_tokens=len(PROMPT),
        max_tokens=8,
        sampling=sampling or ring_pb2.Sampling(logprobs=True),
    )


def step(
    session: int, position: int, tokens: Sequence[int], *, is_sampled: bool = True, opens: bool = False
) -> ring_pb2.Frame:
    return ring_pb2.Frame(
        kind=ring_pb2.STEP,
        epoch=1,
        seq=position + 1,
        opens=[opening(session)] if opens else [],
        slots=[ring_pb2.Slot(session=session, position=position, tokens=tokens, is_sampled=is_sampled)],
    )


def answer(ring: Sequence[Engine], session: int, count: int) -> tuple[list[int], list[float]]:
    trip(ring, step(session, 0, PROMPT[:-1], is_sampled=False, opens=True))
    last, position = PROMPT[-1], len(PROMPT) - 1
    tokens, logprobs = [], []
    for _ in range(count):
        result = trip(ring, step(session, position, [last]))
        assert result is not None
        slot = result.slots[0]
        assert not slot.error
        last, position = slot.result.id, position + 1
        tokens.append(last)
        logprobs.append(slot.result.logprob)
    return tokens, logprobs


@pytest.mark.parametrize("cuts", [[], [2], [1, 4], [1, 2, 3, 4]])
def test_tokens_and_logprobs_are_mlx_lms(model: Path, cuts: list[int]) -> None:
    assert answer(stages(model, cuts), 1, 8) == greedy(model, PROMPT, 8)


def test_sessions_do_not_see_each_other(model: Path) -> None:
    ring = stages(model, [2])
    alone, _ = greedy(model, PROMPT, 6)
    trip(ring, step(7, 0, [1, 2, 3], opens=True))
    assert answer(ring, 8, 6)[0] == alone
    assert set(ring[0].sessions) == {7, 8}


def test_close_frees_on_every_stage(model: Path) -> None:
    ring = stages(model, [2])
    answer(ring, 1, 2)
    assert all(engine.memory.kv_bytes > 0 for engine in ring)
    close = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=99, closes=[1])
    assert trip(ring, close) is None
    assert all(not engine.sessions and engine.memory.kv_bytes == 0 for engine in ring)


def test_a_wrong_position_fails_that_slot_alone(model: Path) -> None:
    ring = stages(model, [2])
    trip(ring, step(1, 0, PROMPT, opens=True))
    frame = step(1, 3, [5])
    frame.opens.append(opening(2))
    frame.slots.add(session=2, position=0, tokens=PROMPT, is_sampled=True)
    result = trip(ring, frame)
    assert result is not None
    bad, good = result.slots
    assert "is at position 8, not at 3" in bad.error
    assert bad.session == 1
    assert not good.error
    assert good.result.id == greedy(model, PROMPT, 1, chunk=len(PROMPT))[0][0]


def test_an_unknown_session_fails_with_a_sentence(model: Path) -> None:
    result = trip(stages(model, [2]), step(5, 0, [1]))
    assert result is not None
    assert "session 5 is not open on this stage" in result.slots[0].error


def test_a_bad_sampling_value_fails_that_session(model: Path) -> None:
    ring = stages(model, [2])
    frame = step(1, 0, PROMPT)
    frame.opens.append(opening(1, ring_pb2.Sampling(temperature=-1)))
    result = trip(ring, frame)
    assert result is not None
    assert "temperature" in result.slots[0].error
