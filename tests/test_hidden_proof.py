"""Which architectures give what their head gets, and checkpoints that come without a head."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from cluster.abilities import abilities_of
from cluster.proof import Prover
from planner.cost import CostModel
from planner.model_profile import read_model_profile
from planner.workload import Workload
from proto import ring_pb2
from shard_loader.hidden_proof import why_no_hidden
from shard_loader.rehearsal import Rehearsal
from shard_loader.survey import own_tensors
from shard_loader.weights import WeightsError, load_shard
from tests.embedding_models import write_embedding_files, write_embedding_model
from tests.fake_models import node
from tests.tiny_models import tiny_config, write_checkpoint
from tests.zoo.configs import zoo_config

ELSE = "its head gets something else than its inner part returns"
TEXT = ring_pb2.Sampling()
VECTOR = ring_pb2.Sampling(pooling=ring_pb2.Pooling(kind=ring_pb2.Pooling.MEAN))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen3_moe", "gemma3_text", "deepseek_v3", "mamba2"])
def test_the_head_gets_what_the_inner_part_returns(arch: str) -> None:
    assert why_no_hidden(Rehearsal(tiny_config(arch, 3))) == ""


@pytest.mark.parametrize("arch", ["minicpm", "gemma4_text", pytest.param("cohere", marks=pytest.mark.long)])
def test_an_architecture_with_a_step_between_is_refused(arch: str, tmp_path: Path) -> None:
    """cohere and gemma4 have one behind the head, minicpm one before it."""
    config = zoo_config(arch) | ({"dim_model_base": 16} if arch == "minicpm" else {})
    assert why_no_hidden(Rehearsal(config)) == ELSE
    (tmp_path / "config.json").write_text(json.dumps(config))
    prover = Prover(write_embedding_files(tmp_path), threading.Event(), print)
    assert prover.why_no_hidden() == ELSE


def test_what_a_model_can_do(tmp_path: Path) -> None:
    folder = write_embedding_model("llama", tmp_path / "m", num_layers=3, has_head=False)
    model = read_model_profile(folder)
    able = abilities_of(model, folder, SimpleNamespace(why_no_hidden=lambda: ""))
    able.check(VECTOR)
    with pytest.raises(ValueError, match=r"^m is an embedding model without a head, so it writes no text"):
        able.check(TEXT)
    able = abilities_of(model, folder, SimpleNamespace(why_no_hidden=lambda: ELSE))
    with pytest.raises(ValueError, match=rf"^m gives no embeddings: what the architecture .*\({ELSE}\);"):
        able.check(VECTOR)
    folder = write_checkpoint("llama", tmp_path / "n", num_layers=3)
    able = abilities_of(read_model_profile(folder), folder, SimpleNamespace(why_no_hidden=pytest.fail))
    able.check(TEXT)
    with pytest.raises(ValueError, match=r"^n gives no embeddings: its files have no modules\.json"):
        able.check(VECTOR)


@pytest.mark.parametrize("is_bare", [False, True])
def test_a_checkpoint_without_a_head_loads_where_it_says_what_it_is(is_bare: bool, tmp_path: Path) -> None:
    folder = write_embedding_model("llama", tmp_path, num_layers=3, has_head=False, is_bare=is_bare)
    shard = load_shard(folder, 1, 3)
    assert shard.vocab_size == 320
    assert shard.footprint.head_bytes == shard.footprint.embed_bytes == 0
    assert shard.footprint.norm_bytes == 64 * 4
    logits = shard.forward(mx.array([[1, 2]]), mx.zeros((1, 2, 64)), shard.new_state())
    assert logits.shape == (1, 2, 320)
    assert mx.isnan(logits).all().item()  # nobody takes them for an answer
    prefix = "" if is_bare else "model."
    assert f"{prefix}norm.weight" in own_tensors(folder, 1, 3)
    assert f"{prefix}embed_tokens.weight" not in own_tensors(folder, 1, 3)
    (folder / "modules.json").unlink()
    with pytest.raises(WeightsError, match=r"^the checkpoint lacks tensor 'lm_head\.weight'"):
        load_shard(folder, 1, 3)


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight"])
def test_any_other_missing_tensor_still_fails_by_name(name: str, tmp_path: Path) -> None:
    folder = write_embedding_model("llama", tmp_path, num_layers=3, has_head=False, is_bare=True)
    file = str(folder / "model.safetensors")
    weights: dict[str, Any] = dict(mx.load(file))  # type: ignore[arg-type]
    mx.eval(weights)
    del weights[name]
    mx.save_safetensors(file, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=rf"^the checkpoint lacks tensor 'model\.{name}'$"):
        load_shard(folder, 0, 3)


@pytest.mark.parametrize("has_head", [False, True])
def test_a_plan_counts_what_is_loaded(has_head: bool, tmp_path: Path) -> None:
    folder = write_embedding_model("llama", tmp_path, num_layers=3, has_head=has_head)
    model = read_model_profile(folder)
    assert model.has_head == has_head
    cost = CostModel(model, [node(0, 1)], (), Workload(256, 1))
    for start, stop in ((0, 1), (1, 3), (0, 3)):
        assert cost.weights(start, stop).total_bytes == load_shard(folder, start, stop).footprint.total_bytes
