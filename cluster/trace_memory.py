"""Bytes of a node, many times a second while somebody traces them: a thread that ends with the trace."""

from __future__ import annotations

import threading
import time

from cluster.node import Node
from cluster.trace_recorder import Kind, Recorder
from cluster.usage import rss_bytes

INTERVAL_S = 0.02
FIELDS = ("weights", "kv", "active", "cache", "peak", "rss", "activations")  # a record's numbers, in bytes


def sample_memory(node: Node, records: Recorder) -> None:
    """Start the thread; it makes a record each INTERVAL_S while `records.has_memory`."""
    threading.Thread(target=_sample, args=(node, records), name="trace-memory", daemon=True).start()


def _sample(node: Node, records: Recorder) -> None:
    pause = threading.Event()
    while records.has_memory:
        status, now = node.status(), time.perf_counter()
        part = status.footprint
        own = part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes
        numbers = (
            own or status.loaded_bytes,
            status.kv_bytes,
            status.active_bytes,
            status.memory.cache_bytes,
            status.peak_bytes,
            rss_bytes(),
            status.memory.activation_bytes,
        )
        records.add(Kind.MEMORY, 0, now, now, numbers=numbers)
        pause.wait(INTERVAL_S)
