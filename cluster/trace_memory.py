"""Bytes of a node, many times a second while somebody traces them: a thread that ends with the trace."""

from __future__ import annotations

import threading
import time

from cluster.node import Node
from cluster.trace_recorder import Kind, Recorder
from cluster.usage import rss_bytes

INTERVAL_S, MAX_INTERVAL_S = 0.02, 0.2  # between two looks: few in a long load, that none is overwritten
INTERVAL_SHARE = 1 / 500  # of the time so far


class MemorySampler:
    """Makes a record now and again while `records.has_memory`."""

    def __init__(self, node: Node, records: Recorder) -> None:
        self._node, self._records = node, records
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look at once, and go on; nothing happens where that is done already."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="trace-memory", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        began, pause = time.perf_counter(), threading.Event()
        while self._records.has_memory:
            now = time.perf_counter()
            self._records.add(Kind.MEMORY, 0, now, now, numbers=self._look())
            pause.wait(min(MAX_INTERVAL_S, max(INTERVAL_S, (now - began) * INTERVAL_SHARE)))

    def _look(self) -> tuple[int, ...]:
        """As MEMORY_FIELDS. While weights are loaded, those that are there."""
        status = self._node.status()
        part = status.footprint
        own = part.layers_bytes + part.embed_bytes + part.norm_bytes + part.head_bytes + part.other_bytes
        return (
            own or status.loaded_bytes,
            status.kv_bytes,
            status.active_bytes,
            status.memory.cache_bytes,
            status.peak_bytes,
            rss_bytes(),
            status.memory.activation_bytes,
        )
