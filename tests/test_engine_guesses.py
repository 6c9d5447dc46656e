"""Guesses on real engines: the answers are those of the whole model, whatever the caches are."""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path

import pytest

from cluster.engine import Engine
from cluster.instructions import Emit, Fail, Instruction, Send
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from shard_loader.reach import Reach
from tests.reference import greedy
from tests.test_engine import LAYERS, stages, trip
from tests.tiny_models import write_checkpoint

LONG = pytest.mark.long
LONG_LATENT, LONG_WINDOW = (pytest.param(name, marks=LONG) for name in ("deepseek_v3", "gpt_oss"))
REACHES = {
    "llama": Reach.ANY,
    "deepseek_v3": Reach.ANY,
    "gpt_oss": Reach.PASS,
    "mamba2": Reach.MARK,
}


@pytest.fixture(scope="module", params=list(REACHES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_layers=LAYERS)


class Ring:
    """A scheduler over real engines; frames come back in order, one at a time."""

    def __init__(self, model: Path, cuts: list[int], max_drafts: int = 5) -> None:
        self.engines: list[Engine] = stages(model, cuts)
        self.reach = min(engine.reach for engine in self.engines)
        windows = [engine.trim_window for engine in self.engines]
        limits = Limits(
            *(256, 4, len(self.engines) + 1, 16),
            max_rows=4,
            share=lambda n: n / 256,
            trim_window=min(-1 if window is None else window for window in windows),
            reach=self.reach,
            max_drafts=max_drafts,
        )
        self.scheduler = Scheduler(max_queued=16)
        self.scheduler.ring_up(1, limits)
        self.frames: deque[ring_pb2.Frame] = deque()
        self.answers: dict[str, list[int]] = {}
        self.num_trips = 0

    def submit(self, name: str, prompt: list[int], max_tokens: int, sampling: ring_pb2.Sampling) -> None:
        self._take(self.scheduler.submit(name, prompt, max_tokens, sampling))

    def step(self) -> None:
        result = trip(self.engines, self.frames.popleft())
        if result is not None:
            self.num_trips += 1
            tokens = max(len(slot.tokens) for slot in result.slots) or 1
            self._take(self.scheduler.on_result(1, result.seq, result.slots, 1.0 + 0.05 * tokens))

    def run(self) -> None:
        while self.frames:
            self.step()

    def _take(self, instructions: list[Instruction]) -> None:
        for one in instructions:
            assert not isinstance(one, Fail), one.message
            if isinstance(one, Send):
                self.frames.append(one.frame)
            elif isinstance(one, Emit):
                self.answers.setdefault(one.request_id, []).append(one.token.id)


FEW_WORDS = {65: 9.0, 66: 9.0, 67: 8.0}  # a bias that makes even a random model repeat itself


@pytest.mark.parametrize("cuts", [pytest.param([], marks=LONG), pytest.param([2], marks=LONG), [1, 4]])
def test_greedy_answers_are_those_without_guesses(model: Path, cuts: list[int]) -> None:
    ring, plain = Ring(model, cuts), Ring(model, cuts, max_drafts=0)
    prompt = [72, 101, 108, 108, 111]
    for name, bias in (("biased", FEW_WORDS), ("plain", {})):
        for one in (ring, plain):
            one.submit(name, prompt, 40, ring_pb2.Sampling(logit_bias=bias))
            one.run()
    assert ring.answers == plain.answers
    assert ring.answers["plain"] == greedy(model, prompt, 40)[0]
    speculation = ring.scheduler.speculation
    assert 0 < speculation.num_right < speculation.num_guessed  # some wrong, so that stages went back
    assert ring.num_trips < plain.num_trips


def test_the_reach_is_that_of_the_caches(model: Path) -> None:
    assert Ring(model, [2]).reach == REACHES[json.loads((model / "config.json").read_text())["model_type"]]


# deepseek_v3 reaches as far as llama, and takes twice as long.
@pytest.mark.parametrize("model", ["llama", LONG_WINDOW, "mamba2", LONG_LATENT], indirect=True)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=LONG) for seed in (1, 2))])
def test_drawn_answers_are_those_without_guesses(model: Path, seed: int) -> None:
    """With temperature, penalties, a ban of stop ids, company that comes and goes, and next turns."""
    draws = random.Random(seed)
    answers = []
    prompts = [[draws.randrange(60, 70) for _ in range(draws.randrange(5, 30))] for _ in range(4)]
    prompts = [prompt * 3 for prompt in prompts]
    for max_drafts in (0, 5):
        ring, choice = Ring(model, [1, 4], max_drafts), random.Random(seed)
        for name, prompt in enumerate([*prompts, *prompts]):
            sampling = ring_pb2.Sampling(
                temperature=choice.choice([0.0, 0.2, 0.7]),
                top_p=choice.choice([1.0, 0.8]),
                seed=seed,
                presence_penalty=choice.choice([0.0, 0.5]),
                repetition_penalty=choice.choice([0.0, 1.1]),
                logit_bias=FEW_WORDS,
                min_tokens=choice.choice([0, 10]),
                stop_ids=[choice.randrange(128)],
            )
            ring.submit(str(name), prompt, choice.randrange(1, 40), sampling)
            for _ in range(choice.randrange(20)):
                if ring.frames:
                    ring.step()
        ring.run()
        answers.append(ring.answers)
    assert answers[0] == answers[1]
    assert ring.scheduler.speculation.num_guessed > 0
    assert ring.scheduler.counters.num_cached_tokens > 0 or ring.reach < Reach.ANY
