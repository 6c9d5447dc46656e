"""What the head concludes from the proof of a plan's cuts. Real proof processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster import proof
from cluster.errors import UserError
from cluster.proof import prove
from planner.plan import Assignment, MemorySummary, Plan, Predicted
from tests.tiny_models import tiny_config


def plan_of(cuts: Sequence[int], num_layers: int) -> Plan:
    """A plan of that many layers with a stage between each two cuts."""
    bounds = [0, *cuts, num_layers]
    last = len(bounds) - 2
    stages = tuple(
        Assignment(i, f"n{i}", i, start, stop, i == 0, i == last, 1, 1, 1, 0, 9, 1.0, 1.0)
        for i, (start, stop) in enumerate(pairwise(bounds))
    )
    figures = Predicted(1.0, 1.0, 1.0), MemorySummary(9, 9, 0)
    return Plan("m", "optimal", "latency", num_layers, 64, 1, stages, (), *figures)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder of nothing but its config: a proof needs no weights."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(model_dir: Path, plan: Plan) -> str:
    with pytest.raises(UserError) as refused:
        prove(model_dir, plan, threading.Event())
    assert refused.value.exit_code == 1
    return str(refused.value)


def test_exact_cuts_pass(tmp_path: Path) -> None:
    prove(write_config(tmp_path, tiny_config("llama", 5)), plan_of([2, 3], 5), threading.Event())


def test_one_stage_needs_no_proof(tmp_path: Path) -> None:
    prove(tmp_path / "nowhere", plan_of([], 5), threading.Event())


def test_a_cut_that_is_not_exact_is_refused_by_its_layer(tmp_path: Path) -> None:
    """nanbeige's layers run more than once in a pass."""
    config = tiny_config("llama", 10) | {"model_type": "nanbeige", "num_loops": 2}
    sentence = refusal(write_config(tmp_path, config), plan_of([3, 8], 10))
    assert sentence.startswith(
        "this plan cuts the model where it is not exact (before layer 3: layer 0 runs 2 times"
    )
    assert sentence.endswith("); plan other layers")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    config = tiny_config("llama", 5) | {"model_type": "llama_of_tomorrow"}
    sentence = refusal(write_config(tmp_path, config), plan_of([2], 5))
    assert "llama_of_tomorrow" in sentence


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, plan_of([2], 5))
    assert sentence.startswith("the cuts [2] could not be proven: ")
    assert str(tmp_path / "config.json") in sentence


def run_instead(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """The proof's process runs this in place of the proof."""
    popen = subprocess.Popen

    def start(_command: object, **options: Any) -> subprocess.Popen[str]:
        return popen([sys.executable, "-c", script], **options)

    monkeypatch.setattr(proof.subprocess, "Popen", start)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import os; os.kill(os.getpid(), 9)", "the proof ended with code -9"),
        ("import sys; print('{'); sys.exit('out of memory')", "out of memory"),
        ("print('[]')", "the proof ended with code 0"),
    ],
)
def test_a_proof_that_dies_is_no_proof(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, script)
    assert refusal(tmp_path, plan_of([2], 5)) == f"the cuts [2] could not be proven: {why}"


def test_a_proof_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(proof, "PROOF_TIMEOUT_S", 0.3)
    assert refusal(tmp_path, plan_of([2], 5)).startswith("the cuts [2] could not be proven within 0 s; ")


def test_a_stop_ends_the_proof_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "import time; time.sleep(60)")
    stopping = threading.Event()
    timer = threading.Timer(0.3, stopping.set)
    timer.start()
    started = time.monotonic()
    prove(tmp_path, plan_of([2], 5), stopping)
    assert 0.2 < time.monotonic() - started < 2.0
    timer.join()
