"""Predicted bytes against measured ones: weights by part, for every stage of the tiny models and the demo."""

from __future__ import annotations

import gc
from itertools import combinations
from pathlib import Path

import mlx.core as mx
import pytest

from cluster.engine import Engine
from deploy.demo.run import CONFIG
from planner.cost import CostModel
from planner.model_profile import read_model_profile
from planner.node_profile import make_node
from planner.workload import Workload
from proto import ring_pb2
from shard_loader.weights import load_shard
from tests.tiny_models import write_checkpoint

NUM_LAYERS = 5
ARCHITECTURES = ["llama", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2"]
ROUNDING = 1.01


QUICK = ("8 bit", "gemma3_text", "single experts")


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
        for name in (*ARCHITECTURES, "8 bit", "single experts", "demo")
    ],
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth") / "model"
    match request.param:
        case "demo":
            return CONFIG.parent / "model"
        case "8 bit":
            quantize = {"bits": 8, "group_size": 64}
            return write_checkpoint("qwen3", folder, num_layers=NUM_LAYERS, quantize=quantize)
        case "single experts":
            return write_checkpoint("qwen3_moe", folder, num_layers=NUM_LAYERS, unstack_experts=True)
    return write_checkpoint(request.param, folder, num_layers=NUM_LAYERS)


def cost_of(folder: Path, context: int = 256) -> CostModel:
    node = make_node(0, "n", "n", memory_bytes=16 * 10**9, chip="x86")
    return CostModel(read_model_profile(folder), [node], (), Workload(context, 1))


def test_each_part_of_each_stage_weighs_what_was_predicted(checkpoint: Path) -> None:
    cost = cost_of(checkpoint)
    for start, stop in combinations(range(cost.model.num_layers + 1), 2):
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        shard = load_shard(checkpoint, start, stop)
        found, expected = shard.footprint, cost.weights(start, stop)
        measured = [
            found.layers_bytes,
            found.embed_bytes,
            found.norm_bytes + found.other_bytes,
            found.head_bytes,
        ]
        predicted = [
            expected.layers_bytes,
            expected.embed_bytes,
            expected.norm_bytes,
            expected.head_bytes,
        ]
        assert measured == pytest.approx(predicted, rel=0.01), (start, stop)
        assert expected.total_bytes == cost.weight_bytes(start, stop)
        active = mx.get_active_memory() - before
        num_arrays = sum(len(group) for group in shard.ownership.groups)
        # MLX rounds each array up to its allocation unit, and modules keep a few constants.
        assert 0 <= active - found.total_bytes <= 0.01 * found.total_bytes + 4096 * (num_arrays + 64)
        del shard


def test_a_stage_measures_its_steps(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "llama", num_layers=NUM_LAYERS)
    cost, prompt = cost_of(folder), list(range(200))
    engine = Engine(load_shard(folder, 0, NUM_LAYERS))
    spec = ring_pb2.SessionSpec(session=1, prompt_tokens=201, max_tokens=4, sampling=ring_pb2.Sampling())
    slot = ring_pb2.Slot(session=1, position=0, tokens=prompt)
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=1, opens=[spec], slots=[slot])
    engine.step(frame, ())
    used = engine.memory
    assert used.kv_bytes == used.peak_kv_bytes == cost.kv_bytes(0, NUM_LAYERS)
    assert 0 < used.activation_bytes <= cost.activation_bytes(0, 0, NUM_LAYERS)
    assert used.peak_bytes >= engine.shard.footprint.total_bytes + used.kv_bytes
    engine.step(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=1, seq=2, closes=[1]), ())
    assert used.kv_bytes == 0
    assert used.peak_kv_bytes > 0
