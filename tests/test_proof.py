"""What the head concludes from the proof of a plan's cuts. Real proof processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import proof
from cluster.errors import UserError
from cluster.proof import Prover
from shard_loader.cut_proof import CutProof
from tests.tiny_models import tiny_config
from tests.waiting import is_in_time


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder of nothing but its config: a proof needs no weights."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prover(model_dir: Path, stopping: threading.Event | None = None) -> tuple[Prover, list[str]]:
    said: list[str] = []
    return Prover(model_dir, stopping or threading.Event(), said.append), said


def refusal(model_dir: Path, cuts: Sequence[int]) -> str:
    with pytest.raises(UserError) as refused:
        prover(model_dir)[0].prove(cuts)
    assert refused.value.exit_code == 1
    return str(refused.value)


def exact(*cuts: int) -> list[CutProof]:
    return [CutProof(cut, True, 0.0, "") for cut in cuts]


def test_a_proof_is_made_once(tmp_path: Path) -> None:
    folder = write_config(tmp_path, tiny_config("llama", 5) | {"rope_theta": 1234.0})
    first, said = prover(folder)
    assert first.known([2, 3]) is None
    assert first.prove([2, 3]) == exact(2, 3)
    assert said == ["proving the cuts [2, 3] on a tiny model of the same architecture"]
    again, said = prover(folder)
    assert (again.known([2, 3]), again.known([2]), again.known(None)) == (exact(2, 3), None, None)
    assert (again.prove([2, 3]), said) == (exact(2, 3), [])
    assert again.prove(None) == exact(1, 2, 3, 4)
    assert said == ["proving each cut on a tiny model of the same architecture"]


def test_one_stage_needs_no_proof(tmp_path: Path) -> None:
    assert prover(write_config(tmp_path, {"model_type": "llama"}))[0].prove([]) == []


def test_a_cut_that_is_not_exact_says_why(tmp_path: Path) -> None:
    """nanbeige's layers run more than once in a pass."""
    config = tiny_config("llama", 10) | {"model_type": "nanbeige", "num_loops": 2}
    proofs = prover(write_config(tmp_path, config))[0].prove([3, 8])
    reason = "layer 0 runs 2 times a pass, so the model cannot be cut"
    assert proofs == [CutProof(cut, False, None, reason) for cut in (3, 8)]


def test_an_unknown_architecture_is_not_exact(tmp_path: Path) -> None:
    config = tiny_config("llama", 5) | {"model_type": "llama_of_tomorrow"}
    (proof,) = prover(write_config(tmp_path, config))[0].prove([2])
    assert not proof.exact
    assert "llama_of_tomorrow" in proof.reason


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        prover(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_config(tmp_path, tiny_config("llama", 5) | {"rope_theta": 4321.0})


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
    script: str, why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, script)
    assert refusal(folder, [2]) == f"the cuts [2] could not be proven: {why}"


def test_a_proof_that_takes_too_long_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(proof, "PROOF_TIMEOUT_S", 0.3)
    assert refusal(folder, [2]).startswith("the cuts [2] could not be proven within 0 s; ")


def test_a_stop_ends_the_proof_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "import time; time.sleep(60)")
    stopping = threading.Event()
    timer = threading.Timer(0.3, stopping.set)
    timer.start()
    started = time.monotonic()
    assert prover(folder, stopping)[0].prove([2]) == []
    assert time.monotonic() - started > 0.2
    assert is_in_time(time.monotonic() - started, 2.0)
    timer.join()
