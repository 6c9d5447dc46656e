from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from shard_loader.carry import CarryError, flatten
from shard_loader.crossing import Crossing, Hole, assemble, dismantle
from shard_loader.layout import trace
from shard_loader.rehearsal import Rehearsal
from shard_loader.shard import Shard, ShardError
from tests.tiny_models import build, tiny_config
from tests.zoo.configs import zoo_config

NUM_LAYERS = 7
SHARED = ("afm7", "deepseek_v41", "gemma3n", "gemma4", "gemma4_text")


@cache
def rehearsal_of(name: str) -> Rehearsal:
    return Rehearsal(zoo_config(name))


@pytest.fixture(scope="module", params=SHARED)
def rehearsal(request: pytest.FixtureRequest) -> Rehearsal:
    return rehearsal_of(request.param)


def shards(name: str, *cuts: int) -> list[Shard]:
    rehearsal = rehearsal_of(name)
    edges = [0, *cuts, rehearsal.num_layers]
    return [rehearsal._shard(a, b) for a, b in pairwise(edges)]


def run(stages: list[Shard], tokens: mx.array) -> tuple[list[Any], Any]:
    """The carries between the stages and the logits, of one pass."""
    carries, carry = [], None
    for stage in stages:
        carry = stage.forward(tokens, carry, stage.new_state())
        carries.append(carry)
    return carries[:-1], carry


@pytest.mark.parametrize(
    "cuts",
    [
        [2, 5],
        [1, 2, 3, 4, 5, 6],
        *(pytest.param(cuts, marks=pytest.mark.long) for cuts in ([3], [5], [4, 6], [1, 2, 4, 6])),
    ],
)
def test_layers_that_read_what_others_left_behind(rehearsal: Rehearsal, cuts: list[int]) -> None:
    assert rehearsal.error_of(cuts) == 0.0


def test_only_new_keys_and_values_cross_a_cut() -> None:
    """gemma4's last layers read the caches of layers 2 and 3: what crosses grows with the chunk alone."""
    first, last = shards("gemma4_text", 5)
    state = first.new_state()
    sizes = []
    for length in (9, 9, 1):
        arrays, _ = flatten(first.forward(mx.zeros((1, length), mx.int32), None, state))
        mx.eval(arrays)
        sizes.append(sum(array.nbytes for array in arrays))
    offsets_bytes = 8  # of the two positions that come along
    assert sizes[0] == sizes[1]
    assert abs((sizes[0] - offsets_bytes) - 9 * (sizes[2] - offsets_bytes)) <= 9 * offsets_bytes
    assert sorted(last.new_state().own) == [3]


def test_a_stage_that_reads_nothing_shared_passes_it_on() -> None:
    """Layer 4 slides and reads cache 2; what layer 6 needs of cache 3 goes through the stage before it."""
    stages = shards("gemma4_text", 4, 5, 6)
    assert [sorted(stage.new_state().own) for stage in stages] == [[0, 1, 2, 3], [2], [3], [3]]
    carries, _ = run(stages, mx.zeros((1, 3), mx.int32))
    assert [len(carry["calls"]) for carry in carries] == [2, 1, 1]


def test_most_cuts_carry_the_plain_value() -> None:
    for arch in ("llama", "gpt_oss", "mamba2"):
        layout = trace(build(tiny_config(arch, NUM_LAYERS)))
        crossings = [layout.sharing.crossing(cut) for cut in range(1, NUM_LAYERS)]
        assert all(not isinstance(crossing, str) and crossing.is_plain for crossing in crossings)
        assert layout.sharing.needed_by(3, NUM_LAYERS) == frozenset()


def test_a_cache_is_left_as_it_was() -> None:
    """Nothing of the watching stays on a cache after a pass."""
    for stage in shards("gemma3n", 5):
        state = stage.new_state()
        kinds = [type(cache) for cache in state.own.values()]
        if stage.is_first:
            mx.eval(flatten(stage.forward(mx.zeros((1, 2), mx.int32), None, state))[0])
        assert [type(cache) for cache in state.own.values()] == kinds
        assert all("update_and_fetch" not in vars(cache) for cache in state.own.values())


def test_a_carry_that_lacks_an_entry_is_refused() -> None:
    first, last = shards("gemma3n", 5)
    tokens = mx.zeros((1, 2), mx.int32)
    carry = first.forward(tokens, None, first.new_state())
    for wrong in (mx.zeros((1,)), {}, carry | {"calls": []}, carry | {"leaves": 3}, None):
        with pytest.raises(CarryError, match="a carry lacks what the cut before layer 5 needs"):
            last.forward(tokens, wrong, last.new_state())
    assert last.forward(tokens, carry, last.new_state()).shape == (1, 2, 128)


def test_two_layers_that_write_to_one_cache_stay_together() -> None:
    model = build(tiny_config("llama", NUM_LAYERS))
    caches = [KVCache() for _ in range(NUM_LAYERS)]
    caches[5] = caches[2]
    model.make_cache = lambda: caches
    assert isinstance(trace(model).sharing.crossing(2), Crossing)
    assert isinstance(trace(model).sharing.crossing(6), Crossing)
    with pytest.raises(
        ShardError,
        match="the model cannot be cut before layer 4: layers 2 and 5 write to one cache",
    ):
        Shard(model, 1, 4)


def test_taking_a_value_apart() -> None:
    a, b = mx.zeros((1,)), mx.ones((2,))
    value = (a, [None, {"x": b}], 3)
    skeleton, arrays = dismantle(value)
    assert skeleton == (Hole(0), [None, {"x": Hole(1)}], 3)
    assert [array is same for array, same in zip(arrays, (a, b), strict=True)] == [True, True]
    back = assemble(skeleton, lambda number: arrays[number])
    assert (back[0] is a, back[1][1]["x"] is b, back[2]) == (True, True, 3)
