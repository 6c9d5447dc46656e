"""What the compute thread is given, in order.

Where the device has a step that waits for its frame, who brings that frame lets the step begin: the compute
thread need not wake up first.
"""

from __future__ import annotations

import threading
from queue import Queue

from cluster.awaited import Awaited
from cluster.work import StepWork, Work


class Inbox(Queue[Work | None]):
    """Any thread puts, the compute thread gets and expects. None ends it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._awaited: Awaited | None = None

    def put(self, item: Work | None, block: bool = True, timeout: float | None = None) -> None:
        """Never blocks: credits and the head's frames in flight bound it."""
        with self._lock:
            awaited, self._awaited = self._awaited, None  # what comes first is that frame, or another
            if awaited is not None and isinstance(item, StepWork) and awaited.is_in(item.frame, item.tensors):
                awaited.begin(item.frame.slots[0].tokens, item.tensors)
            super().put(item, block, timeout)

    def expect(self, awaited: Awaited) -> None:
        """Until something is put; not where something has been, which comes first."""
        with self._lock:
            self._awaited = awaited if self.empty() else None
