"""What a node's status says of its engine: sessions, steps, hops and kernels. Any thread."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cluster.compute import ComputeThread
from cluster.engine import Engine
from cluster.kernel_status import fill_kernels
from proto import control_pb2


def fill_engine(
    status: control_pb2.NodeStatus,
    engine: Engine,
    compute: ComputeThread,
    hops: Iterable[tuple[int, float]],
    ready_at: float,
) -> None:
    """Add everything of a loaded stage. hops: (to rank, ms); ready_at: on the monotonic clock."""
    stats, told = engine.stats, status.stats
    status.num_sessions = engine.num_sessions
    told.num_steps = stats.num_steps
    told.num_tokens = stats.num_tokens
    told.busy_ms = stats.busy_ms
    told.num_overlapped = compute.num_overlapped
    told.num_built_ahead = engine.ahead.num_taken
    told.num_dropped_ahead = engine.ahead.num_dropped
    told.num_handed_over = engine.ahead.num_handed_over
    told.num_late = engine.ahead.num_late
    told.num_begun = engine.ahead.num_begun
    window = engine.trim_window
    told.trim_window = -1 if window is None else window
    told.reach = engine.reach
    told.uptime_ms = (time.monotonic() - ready_at) * 1e3
    told.recent_step_ms.extend(list(stats.recent_step_ms))
    for rank, ms in hops:
        told.recent_hop_ms.append(ms)
        told.recent_hop_rank.append(rank)
    compute.step_times.fill(told)
    fill_kernels(status, compute.kernels)
