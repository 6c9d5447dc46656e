"""A forward pass that is evaluated some layers at a time, while somebody traces them. Compute thread only.

It gives the same numbers and takes longer: what a node else does as one graph becomes several, each of which
waits for the one before.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx

from cluster.trace_recorder import Kind, recorder
from shard_loader.batch_state import BatchState
from shard_loader.shard import Shard
from shard_loader.state import ShardState


def forward(
    shard: Shard, tokens: mx.array, carry: Any | None, state: ShardState | BatchState, seq: int
) -> Any:
    """As `Shard.forward`; a span of the trace for each group of layers, if that is asked for now.

    The first span has the embedding, too; one more has norm and head.
    """
    num_layers = recorder.layers_per_span
    if not num_layers:
        return shard.forward(tokens, carry, state)
    began = time.perf_counter()
    start = shard.start

    def on_evaluated(stop: int) -> None:
        nonlocal began, start
        now = time.perf_counter()
        recorder.add(Kind.LAYERS, seq, began, now, numbers=(start, stop))
        began, start = now, stop

    out = shard.forward_in_groups(tokens, carry, state, num_layers, on_evaluated)
    if shard.is_last:
        mx.eval(out)
        on_evaluated(shard.stop)
    return out
