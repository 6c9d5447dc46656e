from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engine import Engine
from cluster.fault import Fault, injected, injected_address, overlaps_steps
from cluster.head import _as_injected
from cluster.room import Limits
from proto import ring_pb2
from shard_loader.weights import load_shard
from tests.tiny_models import write_checkpoint


def test_faults_are_numbers_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_FAULT", "layer_delay_ms=2.5,step_delay_ms=20")
    assert injected(Fault.LAYER_DELAY_MS) == 2.5
    assert injected(Fault.STEP_DELAY_MS) == 20
    assert injected(Fault.LOAD_DELAY_S) == 0


def test_a_frame_is_built_beside_another_where_a_gpu_computes_or_the_fault_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (overlaps_steps(True), overlaps_steps(False)) == (True, False)
    monkeypatch.setenv("MACRAME_FAULT", "overlapped_steps=1")
    assert overlaps_steps(False)
    monkeypatch.setenv("MACRAME_FAULT", "overlapped_steps=1,plain_steps=1")
    assert not overlaps_steps(True)


def test_edges_go_through_loopback_relays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert injected_address(1) is None
    monkeypatch.setenv("MACRAME_FAULT", "layer_delay_ms=2,edges_via=1@4001+12@4012")
    assert [injected_address(rank) for rank in (1, 2, 12)] == ["127.0.0.1:4001", None, "127.0.0.1:4012"]
    monkeypatch.setenv("MACRAME_FAULT", "edges_via=1@elsewhere:4001")
    with pytest.raises(ValueError, match="elsewhere"):
        injected_address(1)


def test_a_frame_takes_longer_for_each_own_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint("llama", tmp_path / "llama", num_layers=5)
    monkeypatch.setenv("MACRAME_FAULT", "layer_delay_ms=50")
    engine = Engine(load_shard(model, 0, 3))
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1)
    frame.opens.add(session=1, prompt_tokens=2, max_tokens=1)
    frame.slots.add(session=1, tokens=[72, 101], is_sampled=True)
    started = time.perf_counter()
    assert engine.step(frame, ()) is not None
    assert time.perf_counter() - started >= 3 * 0.05
    assert engine.stats.busy_ms >= 3 * 50
    monkeypatch.setenv("MACRAME_FAULT", "layer_delay_ms=1,token_delay_us=20000")
    engine = Engine(engine.shard)
    started = time.perf_counter()
    assert engine.step(frame, ()) is not None
    assert time.perf_counter() - started >= 3 * 2 * 0.02


def test_the_head_can_be_told_to_send_less(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(context=64, max_active=2, max_in_flight=4, max_rows=32)
    assert _as_injected(limits) == limits
    monkeypatch.setenv("MACRAME_FAULT", "frames_in_flight=1,rows_per_frame=2")
    assert _as_injected(limits) == replace(limits, max_in_flight=1, max_rows=2)
