"""Draws behind guesses have the model's own distribution, whatever was guessed: Pearson's chi-squared test.

Seeds are fixed, so that the test either fails always or never. Beside it, draws that would favour their guess
are shown to fail.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from cluster.engine import Engine
from proto import ring_pb2
from tests.test_engine import stages, trip
from tests.tiny_models import write_checkpoint

pytestmark = pytest.mark.long
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119]
WORDS = (65, 66, 67)  # all that is ever drawn
BIAS = dict.fromkeys(WORDS, 60.0)
LENGTH = 3
NUM_ANSWERS = 1500
CRITICAL = 54.05  # of chi-squared with 26 degrees of freedom, at 0.001


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"), num_layers=5)


def probabilities(model: Path, temperature: float) -> dict[tuple[int, ...], float]:
    """Of each answer of LENGTH words, by mlx-lm."""
    whole = load_model(model)[0]
    found = {}
    for answer in itertools.product(WORDS, repeat=LENGTH):
        logits = whole(mx.array([[*PROMPT, *answer]]), cache=make_prompt_cache(whole))[0]
        chance = 1.0
        for i, word in enumerate(answer):
            words = mx.softmax(logits[len(PROMPT) - 1 + i, list(WORDS)].astype(mx.float32) / temperature)
            chance *= words[WORDS.index(word)].item()
        found[answer] = chance
    return found


def answers(model: Path, temperature: float, guess: Callable[[int], list[int]]) -> Counter[tuple[int, ...]]:
    """Of NUM_ANSWERS seeds; guess(seed): the two words guessed behind the prompt."""
    ring: list[Engine] = stages(model, [2])
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(NUM_ANSWERS):
        sampling = ring_pb2.Sampling(temperature=temperature, seed=seed, logit_bias=BIAS)
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1, closes=[seed] if seed else [])
        frame.opens.add(session=seed + 1, prompt_tokens=len(PROMPT), max_tokens=9, sampling=sampling)
        tokens = [*PROMPT, *guess(seed)]
        frame.slots.add(session=seed + 1, tokens=tokens, is_sampled=True, num_draws=LENGTH)
        answer: list[int] = []
        while len(answer) < LENGTH:
            result = trip(ring, frame)
            assert result is not None
            slot = result.slots[0]
            answer += [slot.result.id, *(token.id for token in slot.more)]
            position = len(PROMPT) + len(answer) - 1
            frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=2)  # goes back where a guess was wrong
            frame.slots.add(session=seed + 1, position=position, tokens=answer[-1:], is_sampled=True)
        found[tuple(answer)] += 1
    return found


def chi_squared(found: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    assert set(found) <= set(chances)
    total = sum(found.values())
    return sum((found[a] - total * p) ** 2 / (total * p) for a, p in chances.items())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answers_behind_guesses_have_the_models_distribution(model: Path, temperature: float) -> None:
    chances = probabilities(model, temperature)
    assert math.isclose(sum(chances.values()), 1.0, rel_tol=1e-3)
    likeliest = max(chances, key=lambda answer: chances[answer])
    found = answers(model, temperature, lambda seed: list(likeliest[: LENGTH - 1]))
    assert chi_squared(found, chances) < CRITICAL
    favoured = Counter(found)
    favoured[likeliest] += NUM_ANSWERS // 10  # as if a tenth had been led by its guess
    assert chi_squared(favoured, chances) > CRITICAL
