"""The kernels of a loaded shard's EXL3 layers: tested on its own tensors, and chosen. Compute thread only."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from kernels.exl3_choice import Verdict, choose
from shard_loader.shard import Shard


def choose_exl3_kernels(shard: Shard, on_step: Callable[[], None] = lambda: None) -> list[Verdict]:
    """Empty where the shard has no such layers, or no kernels run here.

    Whatever fails, the shard computes as before, and the log says why. on_step is called after each trial.
    """
    dtype = getattr(mx, shard.dtype)
    verdicts = choose(shard.own_modules, dtype if mx.issubdtype(dtype, mx.floating) else mx.float16, on_step)
    if any(verdict.choice.max_rows or verdict.choice.is_unpacked for verdict in verdicts):
        shard.warm_up()
        mx.clear_cache()
    return verdicts
