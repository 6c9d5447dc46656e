"""What this process does, moment by moment, while somebody traces it: a ring of the latest records.

Whatever is worth a record asks `recorder.on` first, and does nothing else while that is False. Any thread.
Who traces holds a lease; where it is not renewed the recorder is off by itself and forgets all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from cluster.heartbeat import heartbeat
from proto import trace_pb2

CAPACITY = (
    1 << 15
)  # records, about 8 MB: some 4000 frames of a stage; earlier ones are overwritten and counted
MAX_LEASE_S = 30.0
KEPT_S = 60.0  # after the end, for whoever pulls
NO_PEER = -1
MEMORY_FIELDS = ("weights", "kv", "active", "cache", "peak", "rss", "activations")


class Kind(IntEnum):
    """What a record is about. `numbers` in brackets; a moment has the same begin and end."""

    FED = 1  # head: a frame enters the ring [tokens, is sampled, *sessions], a moment
    OPENED = 2  # head: a session begins with this frame [session]; text: the request's id
    RETURNED = (
        3  # head: a RESULT is dealt with, the frames that follow from it included [session, tokens, ...]
    )
    ENCODED = 4  # arrays' bytes and header become messages [bytes, ring_pb2.Kind]
    SENT = 5  # from there until gRPC has them: time without credit [bytes, ring_pb2.Kind]
    ARRIVED = 6  # the last message of a frame is here, until it is decoded [bytes, ring_pb2.Kind]
    BUILT = 7  # the compute thread takes a frame, until its graph is built [rows, tokens]
    COMPUTED = 8  # an evaluation, as the compute thread waits for it
    COPIED_OUT = 9  # evaluated arrays become bytes
    SAMPLED = 10  # the draw's graph, or what was drawn is read
    LAYERS = 11  # these layers, built and evaluated by themselves [start, stop]
    AHEAD = 12  # a step is built while the stage waits
    DRAFTED = 13  # the draft model does a piece of its work
    MEMORY = 14  # bytes, a moment [as MEMORY_FIELDS]
    LOADED = 15  # a new epoch's layers: fetched, loaded, or found to be here already


class Record(NamedTuple):
    """Times in s, of time.perf_counter()."""

    kind: Kind
    seq: int
    began: float
    ended: float
    peer: int
    numbers: Sequence[int]
    text: str


class Recorder:
    """One trace at a time. `on` is read everywhere; the rest is for who switches, and for who pulls."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.on = False
        self.layers_per_span = 0  # 0: a step is evaluated as a whole
        self.has_memory = False  # bytes are recorded, too; both only while on
        self._lock = threading.Lock()  # guards what follows
        self._id = ""
        self._left_s = 0.0
        self._records: deque[Record] = deque(maxlen=capacity)
        self._num_added = 0

    def add(
        self,
        kind: Kind,
        seq: int,
        began: float,
        ended: float,
        *,
        peer: int = NO_PEER,
        numbers: Sequence[int] = (),
        text: str = "",
    ) -> None:
        """Keep a record; nothing happens where the trace has just ended."""
        record = Record(kind, seq, began, ended, peer, numbers, text)
        with self._lock:
            if self.on:
                self._records.append(record)
                self._num_added += 1

    def switch(self, trace_id: str, lease_s: float, layers_per_span: int = 0, *, memory: bool = False) -> str:
        """On, for so long from now, or off where that is 0; why not, or an empty string."""
        with self._lock:
            if self.on and trace_id != self._id:
                left_s = max(1, round(self._left_s))
                return f"it is being traced already, for {left_s} s more at least; try again then"
            if lease_s <= 0:
                if self.on:
                    self._off()
                    self._left_s = KEPT_S
                return ""
            if trace_id != self._id or not self.on:
                self._records.clear()
                self._num_added, self._id = 0, trace_id
            self._left_s = min(lease_s, MAX_LEASE_S)
            self.layers_per_span, self.has_memory = layers_per_span, memory
            self.on = True
            heartbeat.watch(self)
        return ""

    def pull(self, trace_id: str) -> tuple[list[Record], int] | None:
        """What was recorded, and how many earlier records were overwritten; None: another trace, or none."""
        with self._lock:
            if not self._id or trace_id != self._id:
                return None
            return list(self._records), self._num_added - len(self._records)

    def tick(self, elapsed_s: float) -> None:
        """Timer thread: a lease that nobody renews ends the trace, and what was recorded is let go."""
        with self._lock:
            self._left_s -= elapsed_s
            if self._left_s > 0:
                return
            self._off()
            self._id = ""
            self._records.clear()
            heartbeat.unwatch(self)

    def _off(self) -> None:
        self.on, self.layers_per_span, self.has_memory = False, 0, False


def to_message(record: Record) -> trace_pb2.TraceRecord:
    """For the wire: times in ns."""
    return trace_pb2.TraceRecord(
        kind=record.kind,
        seq=record.seq,
        began_ns=int(record.began * 1e9),
        ended_ns=int(record.ended * 1e9),
        peer=record.peer,
        numbers=record.numbers,
        text=record.text,
    )


recorder = Recorder()  # of this process
