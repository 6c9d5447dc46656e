"""What a decode step makes MLX do stays the same from step to step: launches, and bytes that it keeps."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from cluster.trace_recorder import KEPT_S, Kind, recorder
from planner.kv_profile import KV_STEP_TOKENS
from shard_loader.weights import load_shard
from tests.engine_ring import EngineRing
from tests.graph_counts import count_steps, primitives
from tests.tiny_models import write_checkpoint

LAYERS = 5


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 5)])
def test_no_step_does_more_than_the_one_before(tmp_path: Path, kind: str, start: int, stop: int) -> None:
    shard = load_shard(write_checkpoint(kind, tmp_path, num_layers=LAYERS), start, stop)
    state = shard.new_state()
    first, *steps = count_steps(shard, state, 24)
    assert first.kept_bytes > 0  # the caches' first piece
    assert {step.num_launches for step in steps} == {steps[0].num_launches}
    assert {step.num_primitives for step in steps} == {steps[0].num_primitives}
    assert steps[0].num_primitives <= first.num_primitives
    assert {step.kept_bytes for step in steps} == {0}
    assert steps[-1].scratch_bytes < 4 * max(step.scratch_bytes for step in steps[:6])


def test_caches_grow_once_in_so_many_tokens_and_in_no_other_step(tmp_path: Path) -> None:
    shard = load_shard(write_checkpoint("llama", tmp_path, num_layers=LAYERS), 1, 3)
    state, carry = shard.new_state(), shard._zero_carry()
    chunk = KV_STEP_TOKENS - 4
    out = shard.forward(mx.zeros((1, chunk), mx.int32), mx.repeat(carry[:, :1], chunk, axis=1), state)
    mx.eval(out, state.arrays())
    del out
    grown = [step for step in count_steps(shard, state, 12) if step.kept_bytes]
    assert [step.position for step in grown] == [KV_STEP_TOKENS]
    names = grown[0].primitives
    assert names["Concatenate"] >= 2 * 2  # keys and values of both layers


def test_a_step_is_one_evaluation_on_every_stage(tmp_path: Path) -> None:
    ring = EngineRing(write_checkpoint("llama", tmp_path, num_layers=LAYERS), [2, 4], LAYERS)
    assert recorder.switch("one", 5) == ""
    try:
        ring.ask([1, 2, 3], 6)
        found = recorder.pull("one")
    finally:
        recorder.switch("one", 0)
        recorder.tick(KEPT_S)
    assert found is not None
    evaluations: dict[int, int] = {}
    for record in found[0]:
        if record.kind is Kind.COMPUTED:
            evaluations[record.seq] = evaluations.get(record.seq, 0) + 1
    assert len(evaluations) >= 6
    assert set(evaluations.values()) == {len(ring.engines)}


def test_what_is_evaluated_counts_as_nothing() -> None:
    a = mx.ones((2, 2)) * 3
    assert primitives(a)["Multiply"] == 1
    mx.eval(a)
    assert not primitives(a)
