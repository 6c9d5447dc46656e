"""Kernels that a start had no time for are tested by the compute thread while it has nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cluster import compute as compute_module
from cluster.work import LoadWork
from kernels import expert_subject, moe
from proto import ring_pb2
from tests.test_compute import WAIT_S, Watched
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A compute thread whose starts test nothing; MLX's operations stand in the place of the emulator."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setenv("MACRAME_FAULT", "kernel_budget_s=0")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    monkeypatch.setattr(expert_subject, "CLASSES", ((1, 1), (2, 4)))
    monkeypatch.setattr(compute_module, "TEST_AFTER_S", 0.01)
    made = Watched()
    yield made
    assert made.thread.stop(WAIT_S)


def load(watched: Watched, model: Path, epoch: int = 1) -> None:
    watched.thread.post(LoadWork(epoch, model, "digest", 0, 3))
    assert watched.next() == ("loaded", epoch)


def test_they_are_tested_at_rest_and_used(watched: Watched, tmp_path: Path) -> None:
    load(watched, write_checkpoint("qwen3_moe", tmp_path / "model", num_layers=3))
    thread = watched.thread
    assert thread.kernels is not None
    report = thread.kernels
    wait_for(lambda: not report.untested, WAIT_S)
    (verdicts,) = report.blocks.values()
    assert [one.is_taken for one in verdicts] == [True, True]
    wait_for(lambda: thread.activity == "idle", WAIT_S)
    assert thread.busy_s == 0.0
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1)
    frame.opens.add(session=1, prompt_tokens=1, max_tokens=8)
    frame.slots.add(session=1, position=0, tokens=[1], is_sampled=True)
    watched.step(frame)
    assert {watched.next()[0], watched.next()[0]} == {"output", "released"}
    assert report.num_calls == 3


def test_a_frame_goes_first(watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while a trial runs, which then ends after this piece; nothing of it is kept."""
    answers: list[int] = []

    def compute_one(block: Any, x: mx.array, *others: Any) -> mx.array:
        if not answers:
            watched.step(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=99, seq=7))  # of no epoch: given back
        answers.append(len(x))
        return moe.run_by_mlx(block, x, *others)

    monkeypatch.setattr(moe, "run", compute_one)
    load(watched, write_checkpoint("qwen3_moe", tmp_path / "model", num_layers=3))
    assert watched.next() == ("released", 7)
    assert watched.thread.kernels is not None
    report = watched.thread.kernels
    wait_for(lambda: not report.untested, WAIT_S)
    assert answers == [1] * 3 + [1] * 3 + [2] * 3 + [4] * 3  # the first class again, from its beginning


def test_what_waits_goes_with_its_layers(watched: Watched, tmp_path: Path) -> None:
    model = write_checkpoint("qwen3_moe", tmp_path / "model", num_layers=3)
    watched.thread.post(LoadWork(1, model, "digest", 0, 3))
    watched.thread.post(LoadWork(2, None, "digest", 0, 0))
    assert [watched.next(), watched.next()] == [("loaded", 1), ("loaded", 2)]
    assert watched.thread.kernels is None
