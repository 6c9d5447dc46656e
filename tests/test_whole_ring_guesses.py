"""Guesses in a ring of real processes: they are made, they change nothing, and they can be turned off."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bench_prompts import prompts
from tests.reference import greedy
from tests.ring_processes import RingProcesses

DEMO = Path(__file__).parent.parent / "deploy" / "demo" / "model"
LAYERS = [(0, 3), (3, 6), (6, 9)]


@pytest.mark.parametrize("method", ["auto", pytest.param("off", marks=pytest.mark.long)])
def test_answers_with_guesses_are_the_models(tmp_path: Path, method: str) -> None:
    text = next(prompts("demo", 4096, 120, seed=3))
    prompt = [*text, *text[:60]]
    with RingProcesses(tmp_path, DEMO, LAYERS, context=512, speculation={"method": method}) as ring:
        status = ring.wait_ok()
        assert status.num_guessed == 0
        assert ring.tokens(prompt, 48) == greedy(DEMO, prompt, 48)[0]
        drawn = [ring.tokens(prompt, 24, temperature=0.6, seed=5) for _ in range(2)]
        assert drawn[0] == drawn[1]
        status = ring.wait_ok()
        assert (status.num_guessed_right > 5) == (method == "auto")
        assert status.num_guessed_right <= status.num_guessed
