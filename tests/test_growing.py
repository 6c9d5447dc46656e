"""Caches that were merged, taken apart or cut hold whole steps of tokens, as plans count them."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from shard_loader.shard import Shard
from shard_loader.state import ShardState
from shard_loader.trim import clear_cache
from shard_loader.weights import load_shard
from tests.tiny_models import write_checkpoint

LAYERS = 3
STEP_BYTES = LAYERS * 2 * 2 * 16 * 4 * 256  # keys and values of two heads of 16 in float32


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    return load_shard(
        write_checkpoint("llama", tmp_path_factory.mktemp("model"), num_layers=LAYERS), 0, LAYERS
    )


def read(shard: Shard, num_tokens: int) -> ShardState:
    state = shard.new_state()
    shard.forward(mx.arange(num_tokens)[None] % 256, None, state)
    return state


def test_rows_that_are_merged_grow_to_whole_steps(shard: Shard) -> None:
    batch = shard.merge([read(shard, 200), read(shard, 40)])
    logits = [shard.forward(mx.array([[7], [9]]), None, batch) for _ in range(60)]
    mx.eval(logits, batch.arrays())
    assert batch.positions == [260, 100]
    rows = batch.nbytes - sum(cache.offset.nbytes + cache.left_padding.nbytes for cache in batch.own.values())
    assert rows == 2 * 2 * STEP_BYTES


def test_a_row_by_itself_again_and_a_copy_that_was_cut_do_as_well(shard: Shard) -> None:
    batch = shard.merge([read(shard, 200), read(shard, 40)])
    alone = shard.split(batch, 0)
    shard.forward(mx.array([[7]]), None, alone)
    cut = shard.fork(alone, 100)
    shard.forward(mx.arange(170)[None], None, cut)
    mx.eval(alone.arrays(), cut.arrays())
    assert (alone.nbytes, cut.nbytes) == (STEP_BYTES, 2 * STEP_BYTES)


def test_the_numbers_are_those_of_one_that_was_never_apart(shard: Shard) -> None:
    whole, apart = read(shard, 200), shard.split(shard.merge([read(shard, 200), read(shard, 3)]), 0)
    for token in (5, 6):
        expected = shard.forward(mx.array([[token]]), None, whole)
        assert mx.array_equal(shard.forward(mx.array([[token]]), None, apart), expected)


def test_rows_whose_longest_has_left_give_back_its_steps(shard: Shard) -> None:
    batch = shard.merge([read(shard, 257), read(shard, 241), read(shard, 40)])
    batch.keep([2, 1])
    mx.eval(batch.arrays())
    assert batch.positions == [40, 241]
    assert sum(cache.keys.nbytes + cache.values.nbytes for cache in batch.own.values()) == 2 * STEP_BYTES


def held_bytes() -> int:
    gc.collect()
    clear_cache()
    return int(mx.get_active_memory())


def test_a_recurrent_state_holds_nothing_of_what_its_tokens_took(tmp_path: Path) -> None:
    """Nor of the rows that it shared passes with: a slice keeps the whole array that it is of."""
    sizes = {"head_dim": 16, "state_size": 256}
    model = write_checkpoint("mamba2", tmp_path / "mamba2", num_layers=LAYERS, overrides=sizes)
    shard = load_shard(model, 0, LAYERS)
    before, states = held_bytes(), []
    for _ in range(6):
        states.append(shard.new_state())
        shard.forward(mx.zeros((1, 200), mx.int32), None, states[-1])
        mx.eval(states[-1].arrays())
    nbytes = sum(state.nbytes for state in states)
    assert held_bytes() - before < 1.2 * nbytes
    batch = shard.merge(states)
    del states
    one = shard.split(batch, 2)
    del batch
    mx.eval(one.arrays())
    assert held_bytes() - before < 1.2 * nbytes / 6
