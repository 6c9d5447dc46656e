"""How fast a file is read from the disk, past the system's file cache where that is possible. Any thread.

Linux: O_DIRECT (open(2)), else the file's pages are dropped first (posix_fadvise(2)). macOS: F_NOCACHE
(fcntl(2)). Where neither works, what is measured is called cached.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 8 << 20
F_NOCACHE = 48  # of macOS' fcntl.h
MAX_READ_S = 2.0


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes read in a ms. how: "direct", "dropped" (from the cache, just before) or "cached"."""

    bytes_ms: float
    how: str
    num_bytes: int


def disk_rate(folder: Path, num_bytes: int) -> DiskRate | str:
    """Of a file written into `folder` and removed again; else why it was not measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 4 * num_bytes:
            return f"the disk of {folder} is nearly full"
        with tempfile.NamedTemporaryFile(dir=folder, prefix="profile-", suffix=".tmp") as file:
            block = secrets.token_bytes(CHUNK_BYTES)  # nothing that a disk could compress
            for _ in range(max(1, num_bytes // CHUNK_BYTES)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return file_rate(Path(file.name))
    except OSError as error:
        return f"{folder} cannot be used: {error.strerror or error}"


def file_rate(path: Path, max_s: float = MAX_READ_S) -> DiskRate:
    """Of an existing file, as much of it as is read in max_s. Raises OSError."""
    with contextlib.closing(mmap.mmap(-1, CHUNK_BYTES)) as buffer:  # aligned, as O_DIRECT wants it
        for how in ("direct", "dropped", "cached"):
            try:
                fd = _open(path, how)
            except OSError:
                continue
            try:
                return _read(fd, buffer, how, max_s)
            except OSError:
                if how == "cached":
                    raise
            finally:
                os.close(fd)
    raise OSError(f"{path} cannot be read")


def _open(path: Path, how: str) -> int:
    """Raises OSError where the system or its file system lacks this way."""
    if how == "direct" and sys.platform == "linux":
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    if how == "dropped" and not hasattr(os, "posix_fadvise"):
        raise OSError("no posix_fadvise")
    fd = os.open(path, os.O_RDONLY)
    try:
        if how == "direct":
            import fcntl

            if sys.platform != "darwin":
                raise OSError("no F_NOCACHE")
            fcntl.fcntl(fd, F_NOCACHE, 1)
        elif how == "dropped":
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        os.close(fd)
        raise
    return fd


def _read(fd: int, buffer: mmap.mmap, how: str, max_s: float) -> DiskRate:
    started, done = time.perf_counter(), 0
    while got := os.readv(fd, [buffer]):
        done += got
        if got % mmap.PAGESIZE or time.perf_counter() - started > max_s:  # the file's end, or enough
            break
    elapsed_ms = (time.perf_counter() - started) * 1e3
    if not done:
        raise OSError("the file is empty")
    return DiskRate(done / max(elapsed_ms, 1e-6), how, done)
