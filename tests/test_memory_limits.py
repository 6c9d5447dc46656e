from __future__ import annotations

import mlx.core as mx
import pytest

from cluster.memory_limits import MIN_CACHE_BYTES, MemoryNeed, apply_limits


def test_the_stage_is_wired_with_a_margin_and_not_the_machine() -> None:
    need = MemoryNeed(need_bytes=4 * 10**9, budget_bytes=8 * 10**9, reserve_bytes=2 * 10**9)
    assert need.wired_bytes == 4_200_000_000
    assert need.cache_bytes == 800_000_000


def test_wiring_stays_within_the_ceiling() -> None:
    assert MemoryNeed(10**10, 10**10, 0).wired_bytes == 10**10


def test_a_small_budget_keeps_a_small_cache() -> None:
    assert MemoryNeed(1000, 1000, 0).cache_bytes == MIN_CACHE_BYTES


@pytest.mark.skipif(mx.metal.is_available(), reason="changes the limits of this process on a Mac")
def test_without_metal_the_defaults_hold() -> None:
    before = mx.set_cache_limit(MIN_CACHE_BYTES)
    mx.set_cache_limit(before)
    assert not apply_limits(MemoryNeed(1, 1, 1))
    assert mx.set_cache_limit(before) == before
