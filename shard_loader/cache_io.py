"""Arrays into and out of an entry of the shard cache. Called by the compute thread; a helper thread of each
reader and writer sums and writes bytes that are in memory, while the compute thread goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import mlx.core as mx

from shard_loader.shard_cache import (
    DATA,
    MANIFEST,
    CacheSettings,
    Entry,
    as_json,
    drop_entry,
    find_entry,
    make_room,
    new_folder,
    sync,
)

logger = logging.getLogger(__name__)

_NAMES = {
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}


class CorruptEntryError(Exception):
    """An entry whose bytes are not those that were written."""


class EntryReader:
    """Puts the arrays of an entry in the place of a shard's lazy ones."""

    def __init__(self, entry: Entry) -> None:
        self._entry, self._sums = entry, entry.sums
        self._thread = ThreadPoolExecutor(1, "cache-sum")
        self._found: list[tuple[str, Future[int]]] = []

    def place(self, arrays: Mapping[str, mx.array]) -> None:
        """Each array becomes the entry's one of that name, still lazy. Raises CorruptEntryError."""
        try:
            stored = mx.load(str(self._entry.data))
        except (RuntimeError, ValueError, OSError) as error:
            raise CorruptEntryError(str(error)) from error
        if not isinstance(stored, dict) or not stored.keys() == arrays.keys() == self._sums.keys():
            raise CorruptEntryError("it holds other tensors")
        for name, array in arrays.items():
            if stored[name].shape != array.shape or stored[name].dtype != array.dtype:
                raise CorruptEntryError(f"{name} has another shape or dtype")
            array[:] = stored[name]

    def check(self, arrays: Mapping[str, mx.array]) -> None:
        """Starts to sum those of the evaluated arrays that came from the entry."""
        for name, array in arrays.items():
            if name in self._sums:
                self._found.append((name, self._thread.submit(zlib.crc32, _memory(array))))

    def finish(self) -> None:
        """Raises CorruptEntryError where any sum is another than when the entry was written."""
        for name, found in self._found:
            if found.result() != self._sums[name]:
                raise CorruptEntryError(f"the bytes of {name} have changed")

    def close(self) -> None:
        """Ends the helper thread."""
        self._thread.shutdown(cancel_futures=True)


class EntryWriter:
    """Writes a shard's made arrays as they come, and makes an entry of them in the end.

    A disk that fails ends the entry, not the load.
    """

    def __init__(self, settings: CacheSettings, key: str, arrays: Mapping[str, mx.array]) -> None:
        """`arrays`: all that will come, in their order, still lazy. Raises OSError."""
        self._settings, self._key = settings, key
        self._folder = new_folder(settings)
        self._header = _header(arrays)
        self._data_bytes = len(self._header) + sum(array.nbytes for array in arrays.values())
        self._names = list(arrays)
        self._sums: dict[str, int] = {}
        self._file = (self._folder / DATA).open("xb", buffering=0)
        self._thread = ThreadPoolExecutor(1, "cache-write")
        self._jobs: list[Future[None]] = [self._thread.submit(self._write, self._header)]

    def take(self, arrays: Mapping[str, mx.array]) -> None:
        """The next evaluated arrays; those that were not announced are left out."""
        for name, array in arrays.items():
            if name in self._names:
                self._jobs.append(self._thread.submit(self._add, name, _memory(array)))

    def finish(self) -> None:
        """Waits until all is on the disk; then the entry is there. Errors of the disk are logged."""
        try:
            for job in self._jobs:
                job.result()
            if list(self._sums) != self._names or self._file.tell() != self._data_bytes:
                raise OSError("not all of it was written")
            os.fsync(self._file.fileno())
            manifest = self._folder / f"{MANIFEST}.tmp"
            manifest.write_text(as_json(self._sums, self._data_bytes), encoding="utf-8")
            sync(manifest)
            manifest.rename(self._folder / MANIFEST)
            sync(self._folder)
            with contextlib.suppress(OSError):  # another process was quicker: its entry is as good
                self._folder.rename(self._settings.folder / self._key)
        except OSError as error:
            logger.warning("the shard is not kept in the cache: %s", error)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the helper thread; what is not an entry by now is removed."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        drop_entry(self._folder)

    def _add(self, name: str, data: memoryview) -> None:
        self._sums[name] = zlib.crc32(data)
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self._file.write(view) :]


class Keeper:
    """What the cache does in one load: it hands out an entry, takes arrays for a new one, or nothing."""

    def __init__(self, reader: EntryReader | None = None, writer: EntryWriter | None = None) -> None:
        self._reader, self._writer = reader, writer

    @property
    def is_reading(self) -> bool:
        """What would be made comes from an entry."""
        return self._reader is not None

    def take(self, group: Mapping[str, mx.array]) -> None:
        """These are evaluated now."""
        if self._reader is not None:
            self._reader.check(group)
        if self._writer is not None:
            self._writer.take(group)

    def finish(self) -> None:
        """All groups were taken. Raises CorruptEntryError for an entry that has changed."""
        if self._reader is not None:
            self._reader.finish()
        if self._writer is not None:
            self._writer.finish()

    def close(self) -> None:
        """Ends helper threads, finished or not."""
        for part in (self._reader, self._writer):
            if part is not None:
                part.close()


@contextlib.contextmanager
def keeping(
    settings: CacheSettings | None, made: Mapping[str, mx.array], total_bytes: int, key: Callable[[], str]
) -> Iterator[Keeper]:
    """A Keeper for one load of `total_bytes`, of which `made` (lazy) are not in the checkpoint as they are.

    Raises CorruptEntryError, with the entry removed, where what was read from one cannot be used.
    """
    if settings is None or not settings.is_worth(sum(a.nbytes for a in made.values()), total_bytes):
        yield Keeper()
        return
    name = key()
    entry = find_entry(settings, name)
    if entry is None:
        keeper = Keeper(writer=open_writer(settings, name, made))
    else:
        keeper = Keeper(reader=EntryReader(entry))
    try:
        if entry is not None and keeper._reader is not None:
            keeper._reader.place(made)
        yield keeper
        keeper.finish()
    except (CorruptEntryError, RuntimeError) as error:  # MLX raises the latter for a file that ends too early
        if entry is None:
            raise
        drop_entry(entry.path)
        raise CorruptEntryError(f"{entry.path}: {error}") from error
    finally:
        keeper.close()


def open_writer(settings: CacheSettings, key: str, arrays: Mapping[str, mx.array]) -> EntryWriter | None:
    """A writer, or None (logged) where the cache has no room or cannot be written."""
    try:
        refusal = make_room(settings, sum(array.nbytes for array in arrays.values()))
        if not refusal:
            return EntryWriter(settings, key, arrays)
    except OSError as error:
        refusal = f"{settings.folder} cannot be written: {error}"
    logger.warning("the shard is not kept in the cache: %s", refusal)
    return None


def _header(arrays: Mapping[str, mx.array]) -> bytes:
    """The start of a safetensors file (https://github.com/huggingface/safetensors#format)."""
    table: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        table[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _memory(array: Any) -> memoryview:
    """The bytes of an evaluated array in row order, without a copy where they lie so."""
    view = memoryview(array)
    if not view.c_contiguous:
        array = mx.contiguous(array)
        mx.eval(array)
        view = memoryview(array)
    return view
