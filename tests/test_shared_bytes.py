"""What a stage needs of other layers and of shared tables: predicted from headers, and as it is loaded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest

from planner.cost import CostModel
from planner.model_profile import read_model_profile
from planner.node_profile import GB, make_node
from planner.workload import Workload
from shard_loader.carry import flatten
from shard_loader.weights import load_shard
from tests.zoo.checkpoint import write_zoo_checkpoint

CONTEXT = 256  # tokens; caches grow in steps of as many
CUTS = (0, 2, 5, 7)


@pytest.fixture(
    scope="module", params=["gemma3n", "gemma4", "gemma4_text", "afm7", "longcat_flash_ngram", "talkie"]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def test_weights_and_caches_are_predicted(folder: Path) -> None:
    node = make_node(0, "n", "h", memory_bytes=16 * GB, chip="Apple M4")
    cost = CostModel(read_model_profile(folder), [node], [], Workload(CONTEXT, 1))
    carry = None
    for start, stop in pairwise(CUTS):
        shard = load_shard(folder, start, stop)
        state = shard.new_state()
        carry = shard.forward(mx.zeros((1, CONTEXT), mx.int32), carry, state)
        mx.eval(flatten(carry)[0], state.arrays())
        assert cost.weight_bytes(start, stop) == pytest.approx(shard.footprint.total_bytes, rel=0.03)
        counters_bytes = 64  # positions that recurrent parts keep
        assert state.nbytes - counters_bytes <= cost.kv_bytes(start, stop)
