"""What one decode step of a stage makes MLX do: primitives of its graph, and bytes, as MLX counts them."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from shard_loader.shard import Shard
from shard_loader.state import ShardState

# These describe other arrays' bytes and start nothing on a device (unless they must copy).
VIEWS = frozenset(
    (
        *("Broadcast", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Flatten", "Unflatten"),
        *("StopGradient", "AsStrided", "Slice", "Split"),
    )
)


def primitives(*arrays: Any) -> Counter[str]:
    """Of the graph that evaluating these would run, by name; what is evaluated already counts as nothing."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'\[label ?="([^"]*)", shape=rectangle\]', text.getvalue()))


@dataclass(frozen=True, slots=True)
class StepCounts:
    """One step at a position. Bytes: beside what was active before it."""

    position: int
    primitives: Counter[str]
    kept_bytes: int  # that are active after it and were not before
    scratch_bytes: int  # the most that it had active at once, beside those before it and those it keeps
    cache_bytes: int  # freed buffers that MLX keeps for the next step

    @property
    def num_primitives(self) -> int:
        return self.primitives.total()

    @property
    def num_launches(self) -> int:
        """Without views."""
        return sum(count for name, count in self.primitives.items() if name not in VIEWS)


def count_steps(shard: Shard, state: ShardState, num_steps: int) -> list[StepCounts]:
    """Decode steps of one sequence, each built and evaluated as a stage does it: one evaluation."""
    carry = None if shard.is_first else shard._zero_carry()[:, :1]
    mx.eval([] if carry is None else carry)
    found = []
    for _ in range(num_steps):
        mx.synchronize()
        mx.reset_peak_memory()
        position, before = state.position, mx.get_active_memory()
        tokens = mx.array([[position % 7]])
        out = shard.forward(tokens, carry, state)
        counted = primitives(out, *state.arrays())
        mx.eval(out, state.arrays())
        mx.synchronize()
        peak = mx.get_peak_memory()
        del out, tokens
        kept = mx.get_active_memory() - before
        found.append(StepCounts(position, counted, kept, peak - before - max(0, kept), mx.get_cache_memory()))
    return found
