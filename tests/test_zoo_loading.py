"""Every architecture of the zoo from files: three stages load their own parts and give mlx-lm's numbers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from planner.cost import CostModel
from planner.model_profile import read_model_profile
from planner.node_profile import GB, make_node
from planner.workload import Workload
from shard_loader.carry import flatten
from shard_loader.rehearsal import through_the_wire
from shard_loader.weights import load_shard
from tests.zoo.checkpoint import write_zoo_checkpoint
from tests.zoo.configs import NO_BASELINE, module_names

CUTS = (0, 2, 5, 7)
FAST = ("gemma3n", "hunyuan", "baichuan_m1", "rwkv7")
LOOPED = ("iquestloopcoder", "nanbeige")
ROUGHLY = ("gpt2",)  # its table of positions counts as part of the tied head: little of a real model
TOO_MUCH = ("deepseek_v41",)  # it compresses what it keeps, by a ratio of each layer's own
NAMES = [name for name in module_names() if name not in (*NO_BASELINE, *LOOPED)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.long]) for name in NAMES]
)
def test_three_stages_from_files(name: str, tmp_path: Path) -> None:
    folder = write_zoo_checkpoint(name, tmp_path / name)
    whole, _ = load_model(folder)
    shards = [load_shard(folder, start, stop) for start, stop in pairwise(CUTS)]
    model = read_model_profile(folder)
    cache, states = make_prompt_cache(whole), [shard.new_state() for shard in shards]
    for tokens in ([[5, 9, 3, 3, 17, 60, 2, 8, 1]], [[4, 4, 21]], [[11]]):
        carry = None
        for shard, state in zip(shards, states, strict=True):
            arrays, structure = flatten(shard.forward(mx.array(tokens), carry, state))
            mx.eval(arrays, state.arrays())
            if not shard.is_last and name not in TOO_MUCH:
                crossing_bytes = sum(array.nbytes for array in arrays) / len(tokens[0])
                assert crossing_bytes == pytest.approx(model.cut_bytes[shard.stop], rel=0.05)
            carry = through_the_wire(arrays, structure)
        assert mx.array_equal(carry, whole(mx.array(tokens), cache=cache)).item()
    node = make_node(0, "n", "h", memory_bytes=16 * GB, chip="Apple M4")
    cost = CostModel(model, [node], [], Workload(64, 1))
    for shard in shards:
        predicted = cost.weight_bytes(shard.start, shard.stop)
        assert name in ROUGHLY or predicted == pytest.approx(shard.footprint.total_bytes, rel=0.03)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.long]) for name in (*NAMES, *LOOPED)],
)
def test_what_a_session_keeps_is_predicted(name: str, tmp_path: Path) -> None:
    """Never too little; and not much too much, but for windows that have not been filled."""
    folder = write_zoo_checkpoint(name, tmp_path / name)
    node = make_node(0, "n", "h", memory_bytes=16 * GB, chip="Apple M4")
    cost = CostModel(read_model_profile(folder), [node], [], Workload(256, 1))
    shard = load_shard(folder, 0, cost.model.num_layers)
    state = shard.new_state()
    logits = shard.forward(mx.zeros((1, 250), mx.int32), None, state)
    mx.eval(logits, state.arrays())
    predicted = cost.kv_bytes(0, cost.model.num_layers)
    counters_bytes = 64  # positions that recurrent parts keep
    assert state.nbytes - counters_bytes <= predicted
    assert name in TOO_MUCH or predicted <= 1.1 * state.nbytes
