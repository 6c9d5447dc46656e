"""Which byte ranges of a model's files are on disk, with a checksum each: one appended JSON line per range.

Several threads and several processes may append to one journal: each line is one write in append mode. A line
that a kill cut short is no line. Bytes are on disk before their line is.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from shard_loader.spans import Span, subtract, union


@dataclass(frozen=True, slots=True)
class Record:
    """One range that was written whole; sha256 in hex."""

    file: str
    start: int
    stop: int
    sha256: str


class Journal:
    """The journal at `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._records: dict[str, list[Record]] = {}
        self.reload()

    def reload(self) -> None:
        """Read what others have appended."""
        records: dict[str, list[Record]] = {}
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        for line in lines:
            record = _parse(line)
            if record is None:
                continue
            if record.sha256:
                records.setdefault(record.file, []).append(record)
            else:  # what was written there is not to be trusted
                kept = [r for r in records.get(record.file, []) if not _overlap(r, record)]
                records[record.file] = kept
        with self._lock:
            self._records = records

    def records(self, file: str) -> list[Record]:
        """The ranges of one file, in the order of their lines."""
        with self._lock:
            return list(self._records.get(file, ()))

    def covered(self, file: str) -> list[Span]:
        """What of the file is on disk."""
        return union((record.start, record.stop) for record in self.records(file))

    def add(self, record: Record) -> None:
        """Append a range whose bytes are on disk."""
        self._append(record)
        with self._lock:
            self._records.setdefault(record.file, []).append(record)

    def forget(self, file: str, start: int, stop: int) -> None:
        """Every range that overlaps [start, stop) is not there any more."""
        gone = Record(file, start, stop, "")
        self._append(gone)
        with self._lock:
            self._records[file] = [r for r in self._records.get(file, []) if not _overlap(r, gone)]

    def missing(self, file: str, spans: list[Span]) -> list[Span]:
        """What of `spans` is not on disk."""
        return subtract(spans, self.covered(file))

    def _append(self, record: Record) -> None:
        line = json.dumps([record.file, record.start, record.stop, record.sha256]).encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, b"\n" + line + b"\n")  # the line before may have been cut short
        finally:
            os.close(descriptor)


def _parse(line: bytes) -> Record | None:
    try:
        file, start, stop, sha256 = json.loads(line)
    except (ValueError, TypeError):
        return None
    is_whole = isinstance(file, str) and isinstance(sha256, str)
    if not is_whole or not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop):
        return None
    return Record(file, start, stop, sha256)


def _overlap(a: Record, b: Record) -> bool:
    return a.start < b.stop and b.start < a.stop
