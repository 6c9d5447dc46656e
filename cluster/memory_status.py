"""What a node's status says of its memory: measured by the process, by MLX and by its engine. Any thread."""

from __future__ import annotations

import mlx.core as mx

from cluster.draft_queue import DraftQueue
from cluster.engine import Engine
from cluster.memory_limits import MemoryLimits
from cluster.memory_watch import MemoryWatch
from cluster.usage import Usage
from proto import control_pb2


def fill_memory(
    status: control_pb2.NodeStatus,
    *,
    engine: Engine | None,
    drafts: DraftQueue | None,
    limits: MemoryLimits,
    usage: Usage,
    watch: MemoryWatch,
) -> None:
    """Add everything about memory; pressure becomes the reason of a node that has none of its own."""
    memory, pressure, reading = status.memory, watch.pressure, watch.reading
    status.active_bytes = mx.get_active_memory()
    status.peak_bytes = mx.get_peak_memory()
    status.peak_rss_bytes = usage.peak_rss_bytes
    memory.rss_bytes = usage.rss_bytes
    memory.cache_bytes = mx.get_cache_memory()
    memory.memory_limit_bytes = limits.memory_bytes
    memory.cache_limit_bytes = limits.cache_bytes
    memory.wired_limit_bytes = limits.wired_bytes
    if engine is not None:
        _fill_stage(status, engine)
    if drafts is not None:
        status.drafter.model = drafts.drafter.name
        status.drafter.weight_bytes = drafts.drafter.shard.footprint.total_bytes
        status.drafter.kv_bytes = drafts.kv_bytes
        status.drafter.num_passes = drafts.drafter.num_passes
    if reading is not None:
        memory.total_bytes, memory.available_bytes = reading.total_bytes, reading.available_bytes
        memory.swap_used_bytes = reading.swap_used_bytes
    memory.is_admitting = pressure.is_admitting
    memory.num_trims = watch.num_trims
    status.memory_pressure = pressure.level.word
    if pressure.reason and not status.reason:
        status.reason = f"memory: {pressure.reason}"


def _fill_stage(status: control_pb2.NodeStatus, engine: Engine) -> None:
    part, used = engine.shard.footprint, engine.memory
    status.footprint.layers_bytes = part.layers_bytes
    status.footprint.embed_bytes = part.embed_bytes
    status.footprint.norm_bytes = part.norm_bytes
    status.footprint.head_bytes = part.head_bytes
    status.footprint.other_bytes = part.other_bytes
    status.footprint.full_model_bytes = part.full_model_bytes
    status.kv_bytes = used.kv_bytes
    status.peak_bytes = max(status.peak_bytes, used.peak_bytes)
    status.memory.activation_bytes = used.activation_bytes
    status.memory.peak_kv_bytes = used.peak_kv_bytes
