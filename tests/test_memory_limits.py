from __future__ import annotations

import mlx.core as mx
import pytest

from cluster.memory_limits import MIN_CACHE_BYTES, MemoryLimits, MemoryNeed, apply_limits, limits_for

GB = 10**9


def limits(need: MemoryNeed, recommended_bytes: int = 0, *, can_wire: bool = True) -> MemoryLimits:
    return limits_for(need, recommended_bytes=recommended_bytes, can_wire=can_wire)


def test_the_stage_is_wired_with_a_margin_and_not_the_machine() -> None:
    found = limits(MemoryNeed(4 * GB, 0, budget_bytes=8 * GB, reserve_bytes=2 * GB))
    assert found == MemoryLimits(memory_bytes=10 * GB, cache_bytes=800_000_000, wired_bytes=4_200_000_000)


def test_wiring_stays_within_the_ceiling_and_what_metal_accepts() -> None:
    full = MemoryNeed(10 * GB, 0, budget_bytes=10 * GB, reserve_bytes=0)
    assert limits(full).wired_bytes == 10 * GB
    assert limits(full, 9 * GB).wired_bytes == 9 * GB


def test_what_cannot_wire_is_not_told_to() -> None:
    found = limits(MemoryNeed(4 * GB, 0, budget_bytes=8 * GB, reserve_bytes=2 * GB), can_wire=False)
    assert found.wired_bytes == 0
    assert found.memory_bytes == 10 * GB


def test_a_full_budget_leaves_the_cache_one_steps_activations() -> None:
    full = MemoryNeed(10 * GB, 300_000_000, budget_bytes=10 * GB, reserve_bytes=2 * GB)
    assert limits(full).cache_bytes == 300_000_000


def test_a_stage_forced_beyond_its_budget_may_load_and_is_not_wired_beyond_the_ceiling() -> None:
    found = limits(MemoryNeed(20 * GB, 300_000_000, budget_bytes=8 * GB, reserve_bytes=2 * GB))
    assert found == MemoryLimits(21 * GB, 300_000_000, 10 * GB)


def test_a_small_budget_keeps_a_small_cache() -> None:
    assert limits(MemoryNeed(1000, 10, 1000, 0)).cache_bytes == MIN_CACHE_BYTES


@pytest.mark.skipif(
    mx.metal.is_available() or mx.cuda.is_available(), reason="changes the limits of this process on a GPU"
)
def test_on_a_cpu_the_defaults_hold() -> None:
    before = mx.set_cache_limit(MIN_CACHE_BYTES)
    mx.set_cache_limit(before)
    assert apply_limits(MemoryNeed(1, 1, 1, 1)) == MemoryLimits()
    assert mx.set_cache_limit(before) == before
