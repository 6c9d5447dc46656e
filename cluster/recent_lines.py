"""The latest log lines of this node, numbered, for the head's watch. Any thread."""

from __future__ import annotations

import threading
from collections import deque

from cluster.log_line import LogLine, cut, is_progress
from proto import control_pb2

NUM_KEPT = 200
MAX_PER_STATUS = 64  # lines; the rest goes with the next status
MAX_CHARS = 2000  # of a line on its way to the head


class RecentLines:
    """Keeps NUM_KEPT lines of level info and above."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[LogLine] = deque(maxlen=NUM_KEPT)
        self._num_added = 0

    def add(self, line: LogLine) -> None:
        """Take one more line."""
        if line.level != "debug":
            with self._lock:
                if self._lines and is_progress(self._lines[-1].message, line.message):
                    self._lines.pop()
                self._lines.append(line)
                self._num_added += 1

    def fill(self, status: control_pb2.NodeStatus, sent: int) -> int:
        """Add the lines after number `sent` to a status; the number of the last one that it has now."""
        with self._lock:
            if self._num_added == sent:
                return sent
            lines, first = list(self._lines), self._num_added - len(self._lines) + 1
        for number, line in enumerate(lines, first):
            if number > sent and len(status.logs) < MAX_PER_STATUS:
                status.logs.add(
                    number=number,
                    time_s=line.time_s,
                    level=line.level,
                    source=line.source,
                    message=cut(line.message, MAX_CHARS),
                    request_id=line.request_id,
                )
        return status.logs[-1].number if status.logs else sent
