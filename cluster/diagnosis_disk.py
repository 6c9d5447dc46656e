"""Doctor's check of the disks that a node writes to. Any thread; writes a small file and removes it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cluster.diagnosis import Finding, Subject, fine
from planner.sizes import gb

PROBE_BYTES = 1 << 20
LOW_BYTES = 2 * 10**9  # logs, proofs of cuts and a shard's cache want some room
LOW_SHARE = 0.05  # of a small disk


def disk(subject: Subject) -> Iterable[Finding]:
    """Room in each folder that a node writes to, once for each disk."""
    seen: dict[int, str] = {}
    for purpose, folder, lacking_bytes in _places(subject):
        there = _existing(folder)
        number = there.stat().st_dev
        if seen.get(number) == "wrong" or (number in seen and not lacking_bytes):
            continue
        finding = _look(purpose, folder, there, lacking_bytes)
        seen[number] = "wrong" if finding.is_wrong else "fine"
        yield finding


def _places(subject: Subject) -> Iterable[tuple[str, Path, int]]:
    """What is written where, and how much of it is known to be still lacking."""
    from shard_loader.cache_home import user_cache_dir
    from shard_loader.store import store_root

    config = subject.config
    if config is not None:
        from cluster.diagnosis_model import lacking_bytes, whereabouts

        found = whereabouts(config)
        if not found.is_own_folder:
            yield "the model", found.folder or store_root(), lacking_bytes(found)
    yield "caches", user_cache_dir(), 0
    yield "temporary files", Path(tempfile.gettempdir()), 0


def _look(purpose: str, folder: Path, there: Path, lacking_bytes: int) -> Finding:
    usage = shutil.disk_usage(there)
    room = f"{gb(usage.free)} of {gb(usage.total)} are free on the disk of {folder} ({purpose})"
    code = _try_to_write(there)
    if code == errno.ENOSPC:
        return Finding(
            "disk",
            "error",
            f"the disk of {folder} ({purpose}) is full: {gb(usage.free)} of {gb(usage.total)} are free",
            "a node can fetch no model there, and ends when it cannot write",
            f"du -xhd 1 {there} | sort -h    # shows what takes the room; remove what you do not need",
        )
    if code:
        return Finding(
            "disk",
            "error",
            f"{folder} ({purpose}) cannot be written: {os.strerror(code)}",
            "a node keeps models, proofs and caches there, and cannot start without",
            f"sudo chown -R $(id -un) {there}    # or set {_variable(purpose)} to another folder",
        )
    if lacking_bytes > usage.free:
        return Finding(
            "disk",
            "warning",
            f"{room}, and up to {gb(lacking_bytes)} of the model are not here yet",
            "a node that is given all of it cannot fetch it; it fetches only its own layers",
            f"du -xhd 1 {there} | sort -h    # make room; or set MACRAME_CACHE to a folder on another disk",
        )
    if usage.free < min(LOW_BYTES, usage.total * LOW_SHARE):
        return Finding(
            "disk",
            "warning",
            room,
            "caches and logs grow while nodes run, and a full disk ends them",
            f"du -xhd 1 {there} | sort -h    # shows what takes the room",
        )
    return fine("disk", room)


def _variable(purpose: str) -> str:
    return {"the model": "MACRAME_CACHE", "caches": "XDG_CACHE_HOME"}.get(purpose, "TMPDIR")


def _try_to_write(folder: Path) -> int:
    """0, or the errno of writing a file of PROBE_BYTES there: a disk may have quotas, or be read-only."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".macrame-doctor-") as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = folder.expanduser().absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place
