"""How long a device is busy for sure with a frame like one that it was given. Compute thread only."""

from __future__ import annotations

import time
from collections import OrderedDict, deque

from proto import ring_pb2

NUM_TIMES = 8  # of each kind of frame
MIN_TIMES = 2  # before anything is sure: the first frame of a kind may have waited for its kernels' compiler
MAX_KINDS = 64
SURE_SHARE = 0.8  # of the shortest time: who waited too long sees a shorter one, and so waits less


class Pace:
    """The latest times of each kind of frame: of as many rows, and as many tokens of each.

    began: perf_counter() when the device was given a frame, which it begins once it has ended the one before.
    """

    def __init__(self) -> None:
        self._times_s: OrderedDict[tuple[int, int], deque[float]] = OrderedDict()
        self._ended = 0.0

    def end(self, frame: ring_pb2.Frame, began: float) -> None:
        """The device has ended it now."""
        began, self._ended = max(began, self._ended), time.perf_counter()
        kind = _kind(frame)
        self._times_s.setdefault(kind, deque(maxlen=NUM_TIMES)).append(self._ended - began)
        self._times_s.move_to_end(kind)
        if len(self._times_s) > MAX_KINDS:
            self._times_s.popitem(last=False)

    def sure_s(self, frame: ring_pb2.Frame, began: float) -> float:
        """The device does not end it sooner from now; 0 where fewer than MIN_TIMES were seen."""
        times_s = self._times_s.get(_kind(frame), ())
        least_s = SURE_SHARE * min(times_s) if len(times_s) >= MIN_TIMES else 0.0
        return max(0.0, max(began, self._ended) + least_s - time.perf_counter())


def _kind(frame: ring_pb2.Frame) -> tuple[int, int]:
    return len(frame.slots), len(frame.slots[0].tokens) if frame.slots else 0
