"""MLX's own memory limits, from the plan. `limits_for` is pure; `apply_limits` is for the compute thread.

By default MLX takes up to 1.5 times what Metal recommends, and wires nothing; a Mac then swaps or freezes
before anything is refused (mlx.core.set_memory_limit, set_wired_limit, set_cache_limit).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from planner.draft_part import DraftPart

WIRED_MARGIN = 1.05  # over weights, KV and activations: allocations are rounded up
CACHE_SHARE = 0.1  # of the budget may stay in MLX's cache of freed buffers, where so much is left
MIN_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """A stage's bytes under its plan."""

    need_bytes: int  # weights, KV and activations
    activation_bytes: int
    budget_bytes: int
    reserve_bytes: int

    def with_drafter(self, part: DraftPart) -> MemoryNeed:
        """And a draft model beside it, whose bytes were taken off the budget."""
        return MemoryNeed(
            self.need_bytes + part.need_bytes,
            max(self.activation_bytes, part.activation_bytes),
            self.budget_bytes + part.need_bytes,
            self.reserve_bytes,
        )


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What MLX is told; 0: its own default holds."""

    memory_bytes: int = 0
    cache_bytes: int = 0
    wired_bytes: int = 0


def limits_for(need: MemoryNeed, *, recommended_bytes: int, can_wire: bool) -> MemoryLimits:
    """The limits of a device that recommends at most `recommended_bytes` (0: it does not say).

    memory: budget and reserve together are the device's ceiling or the user's cap; beyond it MLX must not
    grow. cache: what the plan leaves over, at most CACHE_SHARE of the budget, but always the activations of
    one step, which the plan has counted: without them each step would ask the system for its buffers anew.
    wired: the stage with a margin, not the whole machine, and never more than Metal accepts. A stage that
    was forced beyond its budget may grow as far as it needs, or it would not load; it is not wired as far.
    """
    ceiling_bytes = need.budget_bytes + need.reserve_bytes
    forced_bytes = int(need.need_bytes * WIRED_MARGIN) if need.need_bytes > need.budget_bytes else 0
    spare_bytes = min(int(need.budget_bytes * CACHE_SHARE), need.budget_bytes - need.need_bytes)
    wired_bytes = min(int(need.need_bytes * WIRED_MARGIN), ceiling_bytes, recommended_bytes or ceiling_bytes)
    return MemoryLimits(
        memory_bytes=max(ceiling_bytes, forced_bytes),
        cache_bytes=max(MIN_CACHE_BYTES, need.activation_bytes, spare_bytes),
        wired_bytes=wired_bytes if can_wire else 0,
    )


def apply_limits(need: MemoryNeed) -> MemoryLimits:
    """Set them where memory belongs to a GPU; on a CPU MLX's defaults hold, and all are 0."""
    can_wire = mx.metal.is_available()
    has_gpu = can_wire or mx.cuda.is_available()
    if not has_gpu or mx.default_device().type == mx.cpu:
        return MemoryLimits()
    recommended_bytes = int(mx.device_info().get("max_recommended_working_set_size", 0))
    limits = limits_for(need, recommended_bytes=recommended_bytes, can_wire=can_wire)
    mx.set_memory_limit(limits.memory_bytes)
    mx.set_cache_limit(limits.cache_bytes)
    if can_wire:
        mx.set_wired_limit(limits.wired_bytes)
    return limits
