"""Prompts that begin with what a request that still runs has read: on real caches, and the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.fault import Fault
from tests.engine_ring import EngineRing
from tests.reference import greedy
from tests.tiny_models import write_checkpoint

SYSTEM = [(7 * i) % 251 for i in range(150)]
LAYERS = 5


@pytest.fixture(
    scope="module",
    params=["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3_moe", "deepseek_v3"))],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_layers=LAYERS)


@pytest.fixture
def ring(model: Path) -> EngineRing:
    return EngineRing(model, (1, 4), LAYERS, room=8)


def check(ring: EngineRing, model: Path, asked: dict[str, tuple[list[int], int]]) -> None:
    """All answers are the whole model's, and nothing is left."""
    ring.run()
    assert not ring.failed
    for name, (prompt, max_tokens) in asked.items():
        assert ring.answers[name] == greedy(model, prompt, max_tokens)[0], name
    ring.check()


def test_a_system_prompt_is_read_once_while_its_first_chat_is_answered(ring: EngineRing, model: Path) -> None:
    asked = {"first": ([*SYSTEM, 1, 2, 3], 30)} | {str(i): ([*SYSTEM, 9 + i, 4], 6 + i) for i in range(4)}
    for name, (prompt, max_tokens) in asked.items():
        ring.submit(name, prompt, max_tokens)
        while name == "first" and len(ring.answers[name]) < 5:
            assert ring.turn()
    check(ring, model, asked)
    assert [ring.cached[name] for name in asked] == [0, 150, 150, 150, 150]


def test_several_answers_to_one_prompt_read_it_once(ring: EngineRing, model: Path) -> None:
    asked = {str(i): (SYSTEM, 8 + i) for i in range(4)}
    for name, (prompt, max_tokens) in asked.items():
        ring.submit(name, prompt, max_tokens)
    check(ring, model, asked)
    assert [ring.cached[name] for name in asked] == [0, 149, 149, 149]


def test_who_ends_first_leaves_its_copies_whole(ring: EngineRing, model: Path) -> None:
    ring.submit("first", [*SYSTEM, 1], 30)
    while len(ring.answers["first"]) < 3:
        assert ring.turn()
    ring.submit("second", [*SYSTEM, 5], 12)
    ring.cancel("first")
    check(ring, model, {"second": ([*SYSTEM, 5], 12)})
    assert ring.cached["second"] == 150


def test_one_that_fails_does_not_take_those_along_that_began_with_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage breaks on the first one's step while the second is on its way to it."""
    monkeypatch.setenv("MACRAME_FAULT", f"{Fault.STEP_ERROR_AT.value}={len(SYSTEM) + 3}")
    ring = EngineRing(model, (1, 4), LAYERS, room=8)
    ring.submit("first", SYSTEM, 30)
    while len(ring.answers["first"]) < 4:
        assert ring.turn()
    ring.submit("second", SYSTEM[:100], 6)  # it has a frame of its own behind the one that breaks
    assert [frame.opens[0].from_tokens for frame in ring.frames if frame.opens] == [99]
    ring.run()
    assert list(ring.failed) == ["first"]
    assert ring.answers["second"] == greedy(model, SYSTEM[:100], 6)[0]
    assert ring.cached["second"] == 0  # it began anew
    ring.check()
