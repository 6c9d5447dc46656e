"""The head's copy of every node's latest log lines, which outlives the node. Any thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.log_line import LEVELS, checked_id, cut, is_progress
from cluster.recent_lines import MAX_CHARS, NUM_KEPT
from proto import control_pb2, head_pb2


@dataclass(slots=True)
class _Kept:
    """Of one rank. Numbers count anew with each incarnation."""

    incarnation: int = 0
    number: int = 0  # of the last line taken
    lines: deque[control_pb2.LogLine] = field(default_factory=lambda: deque(maxlen=NUM_KEPT))


class LogBook:
    """The last NUM_KEPT lines of each rank of `names`."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = dict(names)
        self._lock = threading.Lock()
        self._kept = {rank: _Kept() for rank in names}

    def take(self, rank: int, incarnation: int, lines: Iterable[control_pb2.LogLine]) -> None:
        """Keep what is new of a status' lines, whatever another stream brought before."""
        with self._lock:
            kept = self._kept[rank]
            if incarnation != kept.incarnation:
                kept.incarnation, kept.number = incarnation, 0
            for line in lines:
                if line.number > kept.number:
                    kept.number = line.number
                    if kept.lines and is_progress(kept.lines[-1].message, line.message):
                        kept.lines.pop()
                    kept.lines.append(_checked(line))

    def tell(self, rank: int | None, count: int) -> list[head_pb2.RankLogs]:
        """The last `count` lines of a rank, or of all; 0: as many as there are. KeyError: no such rank."""
        with self._lock:
            kept = {r: list(self._kept[r].lines) for r in (sorted(self._kept) if rank is None else [rank])}
        return [
            head_pb2.RankLogs(rank=r, name=self._names[r], lines=lines[-count:]) for r, lines in kept.items()
        ]


def _checked(line: control_pb2.LogLine) -> control_pb2.LogLine:
    return control_pb2.LogLine(
        number=line.number,
        time_s=line.time_s,
        level=line.level if line.level in LEVELS else "info",
        source=cut(line.source, 100),
        message=cut(line.message, MAX_CHARS),
        request_id=checked_id(line.request_id),
    )
