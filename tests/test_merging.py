from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from planner.kv_profile import KV_STEP_TOKENS
from shard_loader.batch_proof import TOLERANCE, fork_error
from shard_loader.merging import forked
from shard_loader.proof_store import find_rows
from shard_loader.rehearsal import Rehearsal
from shard_loader.state import cache_arrays
from tests.zoo.configs import zoo_config

LENGTH = 10 * KV_STEP_TOKENS


def keys(num_tokens: int) -> mx.array:
    return mx.random.normal((1, 2, num_tokens, 64))  # (B, heads, T, D)


def held(cache: object) -> int:
    return sum(array.nbytes for array in cache_arrays(cache))


@pytest.mark.parametrize("kind", [KVCache, QuantizedKVCache, lambda: RotatingKVCache(2 * LENGTH)])
def test_a_short_copy_of_a_long_cache_does_not_hold_its_memory(kind: type[KVCache]) -> None:
    """Else many short prompts that begin like one long chat would take a whole chat's memory each."""
    before_bytes = mx.get_active_memory()
    source, one = kind(), keys(1)
    source.update_and_fetch(keys(LENGTH), keys(LENGTH))
    mx.eval(list(cache_arrays(source)))
    copy = forked(source, LENGTH - 20)
    for _ in range(2):
        copy.update_and_fetch(one, one)
    mx.eval(list(cache_arrays(copy)))
    assert copy.offset == 22
    assert held(copy) <= held(source) // 10 + 2 * one.nbytes
    assert source.offset == LENGTH
    del source
    mx.clear_cache()
    assert mx.get_active_memory() - before_bytes < 4 * held(copy)


def test_a_copy_of_a_layer_without_attention_is_empty_too() -> None:
    copy = forked(CacheList(KVCache(), KVCache()), 5)
    assert all(part.keys is None for part in copy.caches)


@pytest.mark.long
@pytest.mark.parametrize(("name", "is_right"), [("plamo3", False), ("nemotron-nas", True), ("jamba", True)])
def test_a_copy_must_read_several_tokens_at_once_as_a_prompts_rest_is_read(name: str, is_right: bool) -> None:
    """plamo3's attention, in mlx-lm itself, is wrong where they follow a full window."""
    config = zoo_config(name)
    error = fork_error(Rehearsal(config))
    assert error is not None
    assert (error <= TOLERANCE) is is_right
    shipped = find_rows(config)
    assert shipped is not None
    assert shipped.forked is is_right
