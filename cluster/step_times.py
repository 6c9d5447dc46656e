"""The latest steps of a stage by the compute thread's clock: decode steps apart from a prompt's chunks.

Written by the compute thread; any thread may read.
"""

from __future__ import annotations

from collections import deque

from proto import control_pb2, ring_pb2

NUM_DECODE_STEPS = 64
NUM_CHUNKS = 16


class StepTimes:
    """Windows over one epoch. Left out: frames whose rows run one after another, guesses, and failures."""

    def __init__(self) -> None:
        self._decode: deque[tuple[float, int, int]] = deque(maxlen=NUM_DECODE_STEPS)  # ms, position, rows
        self._chunks: deque[tuple[float, int, int]] = deque(maxlen=NUM_CHUNKS)  # ms, tokens, position

    def add(self, frame: ring_pb2.Frame, step_ms: float) -> None:
        """A frame was run in so many ms, its way out of this thread included."""
        slots = frame.slots
        if not slots or any(slot.error for slot in slots) or (len(slots) > 1 and not frame.is_batched):
            return
        if slots[0].num_draws > 1:
            return
        num_tokens = len(slots[0].tokens)
        position = max(slot.position for slot in slots)  # rows are padded to the longest
        if num_tokens == 1:
            self._decode.append((step_ms, position, len(slots)))
        elif num_tokens:
            self._chunks.append((step_ms, num_tokens * len(slots), position))

    def fill(self, stats: control_pb2.StageStats) -> None:
        """Add both windows to a status."""
        decode, chunks = list(self._decode), list(self._chunks)
        stats.decode_ms.extend(step[0] for step in decode)
        stats.decode_position.extend(step[1] for step in decode)
        stats.decode_rows.extend(step[2] for step in decode)
        stats.chunk_ms.extend(chunk[0] for chunk in chunks)
        stats.chunk_tokens.extend(chunk[1] for chunk in chunks)
        stats.chunk_position.extend(chunk[2] for chunk in chunks)
