"""One timer thread for all edges of the process: it beats, and counts how long each peer has been silent."""

from __future__ import annotations

import threading
import time
from typing import Protocol

TICK_S = 0.1
BEAT_INTERVAL_S = 0.2
SILENCE_LIMIT_S = 1.0


class Watched(Protocol):
    """An edge's end. `tick` runs on the timer thread: it must neither block nor raise."""

    def tick(self, elapsed_s: float) -> None:
        """`elapsed_s` since the last tick, at most 2 * TICK_S: a stop of our own is no peer's fault."""


class Heartbeat:
    """Ticks what it watches; its thread exists while there is something to watch. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def watch(self, edge: Watched) -> None:
        """Begin to tick the edge."""
        with self._lock:
            self._watched.add(edge)
            if self._thread is None:
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._wake,), name="heartbeat", daemon=True
                )
                self._thread.start()

    def unwatch(self, edge: Watched) -> None:
        """No tick of the edge begins after this."""
        with self._lock:
            self._watched.discard(edge)
            if not self._watched and self._thread is not None:
                self._thread = None
                self._wake.set()

    def _run(self, stopped: threading.Event) -> None:
        then = time.monotonic()
        while not stopped.wait(TICK_S):
            now = time.monotonic()
            elapsed_s = min(now - then, 2 * TICK_S)
            then = now
            with self._lock:
                edges = tuple(self._watched)
            for edge in edges:
                edge.tick(elapsed_s)


heartbeat = Heartbeat()  # of this process
