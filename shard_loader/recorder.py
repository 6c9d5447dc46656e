"""Writes one run of bytes into a store's file; each piece of it that is whole goes into the journal.

One thread per recorder.
"""

from __future__ import annotations

import hashlib
import os
from types import TracebackType

from shard_loader.journal import Record
from shard_loader.store import FileEntry, Store

PIECE_BYTES = 8 << 20  # what a kill can cost, per connection


class Recorder:
    """Takes the bytes of `entry` from `start` on, in order. `at` is the next one."""

    def __init__(self, store: Store, entry: FileEntry, start: int) -> None:
        self._store, self._entry = store, entry
        self._begin = self.at = start
        self._digest = hashlib.sha256()
        self._file = os.open(store.folder / entry.name, os.O_WRONLY)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is written but not yet in the journal is kept there too, unless writing failed."""
        try:
            if not isinstance(error, OSError):
                self._record()
        finally:
            os.close(self._file)

    def write(self, block: bytes) -> None:
        """The next bytes; raises OSError where the disk does not take them."""
        left = memoryview(block)
        while left:
            part = left[: self._begin + PIECE_BYTES - self.at]
            num_written = os.pwrite(self._file, part, self.at)
            self._digest.update(part[:num_written])
            self.at += num_written
            left = left[num_written:]
            if self.at == self._begin + PIECE_BYTES:
                self._record()

    def _record(self) -> None:
        if self.at == self._begin:
            return
        os.fsync(self._file)  # the bytes before their line
        self._store.journal.add(Record(self._entry.name, self._begin, self.at, self._digest.hexdigest()))
        self._begin, self._digest = self.at, hashlib.sha256()
