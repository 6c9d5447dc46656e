"""Chats on caches that cannot be shortened: what is kept of their prompts, and that answers stay the same."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.kept import MIN_COMMON
from cluster.prompt_points import END_TOKENS, MAX_PROMPTS, MAX_TOKENS, RecentPrompts, next_end, points
from tests.engine_ring import EngineRing
from tests.reference import greedy
from tests.tiny_models import write_checkpoint
from tests.zoo.checkpoint import write_zoo_checkpoint

ZOO = ("jamba", "qwen3_next")
MODELS = (
    "mamba2",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt_oss", "gemma3_text", *ZOO)),
)
STAGES = (pytest.param(1, marks=pytest.mark.long), 3)


def tokens(seed: int, count: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(100) for _ in range(count)]


# -- where ------------------------------------------------------------------------------------------
def test_a_prompt_is_copied_before_its_end_and_where_another_parted_from_it() -> None:
    assert points(100, 0, 0) == [100 - END_TOKENS]
    assert points(100, 0, 40) == [40, 100 - END_TOKENS]
    assert points(100, 0, 80) == [80]  # the two are too near each other
    assert points(100, 0, 99) == [100 - END_TOKENS]
    assert points(100, 40, 40) == [100 - END_TOKENS]
    assert points(100, 100 - END_TOKENS, 95) == []
    assert points(MIN_COMMON + END_TOKENS - 1, 0, 0) == []


def test_chunks_end_at_the_points() -> None:
    ends, at = [], 0
    while at < 100:
        at = next_end(at, 100, 32, [40, 84])
        ends.append(at)
    assert ends == [32, 40, 72, 84, 99, 100]
    assert next_end(0, 1, 32, []) == 1
    assert next_end(98, 100, 32, []) == 99


def test_recent_prompts_are_forgotten_by_number_and_size() -> None:
    recent = RecentPrompts()
    recent.add([1] * 20, "")
    assert recent.num_shared([1] * 30, "") == 20
    assert recent.num_shared([1] * 30, "warm") == 0
    for _ in range(MAX_PROMPTS):
        recent.add([2] * 10, "")
    assert recent.num_shared([1] * 30, "") == 0
    recent.add([3] * MAX_TOKENS, "")
    assert recent.num_shared([2] * 10, "") == 0
    recent.add([3] * (MAX_TOKENS + 1), "")
    assert recent.num_shared([3] * 10, "") == 0


# -- the same tokens --------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ZOO:
        return write_zoo_checkpoint(request.param, folder)
    return write_checkpoint(request.param, folder, num_layers=5)


@pytest.fixture(params=STAGES, ids="{} stages".format)
def ring(request: pytest.FixtureRequest, model: Path) -> EngineRing:
    num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return EngineRing(model, (1, num_layers - 1) if request.param == 3 else (), num_layers)


def ask(ring: EngineRing, model: Path, prompt: Sequence[int], count: int = 6) -> tuple[list[int], int]:
    """As EngineRing.ask, and the answer is the whole model's."""
    answer, num_cached = ring.ask(prompt, count)
    assert answer == greedy(model, prompt, count)[0]
    return answer, num_cached


def test_a_turn_that_leaves_out_the_end_of_the_last_goes_on_from_its_prompt(
    ring: EngineRing, model: Path
) -> None:
    prompt, known = tokens(1, 70), 0
    for turn in range(4):
        answer, num_cached = ask(ring, model, prompt)
        assert num_cached == known
        known = len(prompt) - END_TOKENS
        prompt = [*prompt[:-3], *answer[2:-1], *tokens(2 + turn, 30)]  # a template drops what was thought
    assert ring.num_forks == 4
    ring.check()


@pytest.mark.long
def test_the_same_prompt_again_is_hardly_read(ring: EngineRing, model: Path) -> None:
    prompt = tokens(3, 70)
    assert [ask(ring, model, prompt)[1] for _ in range(3)] == [0, 54, 54]
    assert ring.num_forks == 1


def test_a_third_chat_does_not_read_the_system_prompt(ring: EngineRing, model: Path) -> None:
    system = tokens(4, 50)
    seen = [ask(ring, model, [*system, 101 + chat, *tokens(chat, 40)])[1] for chat in range(4)]
    assert seen == [0, 0, 50, 50]
    ring.check()


@pytest.mark.long
def test_a_short_question_after_a_system_prompt_is_no_hindrance(ring: EngineRing, model: Path) -> None:
    system = tokens(4, 50)
    for length, expected in ((20, [0, 0, 50, 50]), (9, [50] * 4)):
        prompts = [[*system, 101 + chat, *tokens(chat + length, length)] for chat in range(4)]
        assert [ask(ring, model, prompt)[1] for prompt in prompts] == expected
    ring.check()


def test_a_chunk_that_fails_on_a_stage_fails_its_own_request_only(ring: EngineRing, model: Path) -> None:
    """The stages behind have nothing to copy."""
    ring.submit("bad", [1 << 20, *tokens(1, 40)], 4)
    ring.run()
    assert "a token id is not below" in ring.failed.pop("bad")
    ring.check()
    ask(ring, model, tokens(2, 60))


def test_several_answers_to_one_prompt_read_it_once(ring: EngineRing, model: Path) -> None:
    """And so do chats that come at once with their system prompt."""
    prompt = tokens(6, 180)
    asked = {str(n): (prompt, 4 + n) for n in range(4)}
    asked |= {f"chat {n}": ([*prompt[:150], 101 + n, *tokens(n, 30)], 5) for n in range(3)}
    for name, (one, count) in asked.items():
        ring.submit(name, one, count)
    ring.run()
    assert not ring.failed
    assert {name: ring.answers[name] for name in asked} == {
        name: greedy(model, one, count)[0] for name, (one, count) in asked.items()
    }
    first = 150 if len(ring.engines) == 1 else 0  # in a longer ring the first one is past 150 when it comes
    assert list(ring.cached.values()) == [0, 164, 164, 164, first, 150, 150]
    ring.check()


@pytest.mark.long
def test_chats_at_once_with_some_that_leave(ring: EngineRing, model: Path) -> None:
    """Three chats with one system prompt; frames go round in turn with what clients do."""
    draws = random.Random(7)
    system = tokens(5, 40)
    chats = {name: [*system, 110 + name, *tokens(name, 20 + 7 * name)] for name in range(3)}
    num_asked, running = 0, dict[int, str]()
    while num_asked < 18 or running:
        for chat, prompt in chats.items():
            if chat not in running and num_asked < 18:
                running[chat] = f"{chat}: {num_asked}"
                num_asked += 1
                ring.submit(running[chat], prompt, 5)
        for _ in range(draws.randrange(1, 6)):
            ring.turn()
        for chat, name in list(running.items()):
            answer = ring.answers[name]
            if len(answer) == 5:
                assert answer == greedy(model, chats[chat], 5)[0]
                chats[chat] = [*chats[chat][:-2], *answer[:-1], *tokens(num_asked, 12)]
                del running[chat]
            elif draws.random() < 0.05:
                ring.cancel(name)
                del running[chat]
        assert not ring.failed
    ring.run()
    assert ring.scheduler.counters.num_cached_prompts >= 8
    ring.check()
