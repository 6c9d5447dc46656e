"""MLX's own memory limits, from the plan. Compute thread, before a load.

By default MLX takes up to 1.5 times what Metal recommends, and wires nothing; a Mac then swaps or freezes
before anything is refused (mlx.core.set_memory_limit, set_wired_limit, set_cache_limit).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

WIRED_MARGIN = 1.05  # over weights, KV and activations: allocations are rounded up
CACHE_SHARE = 0.1  # of the budget may stay in MLX's cache of freed buffers
MIN_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """A stage's bytes under its plan."""

    need_bytes: int  # weights, KV and activations
    budget_bytes: int
    reserve_bytes: int

    @property
    def wired_bytes(self) -> int:
        """What must not be swapped out: the stage with a margin, not the whole machine."""
        return min(int(self.need_bytes * WIRED_MARGIN), self.budget_bytes + self.reserve_bytes)

    @property
    def cache_bytes(self) -> int:
        """What MLX may keep of freed buffers."""
        return max(MIN_CACHE_BYTES, int(self.budget_bytes * CACHE_SHARE))


def apply_limits(need: MemoryNeed) -> bool:
    """Set the limits where memory belongs to Metal; elsewhere MLX's defaults hold, and False is returned."""
    if not mx.metal.is_available():
        return False
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0))
    mx.set_memory_limit(need.budget_bytes + need.reserve_bytes)
    mx.set_cache_limit(need.cache_bytes)
    mx.set_wired_limit(min(need.wired_bytes, recommended) if recommended else need.wired_bytes)
    return True
