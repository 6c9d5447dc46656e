"""The shard cache: what loading made of a checkpoint (stacked, quantised, cast), kept on disk for the next
start.

An entry is a folder with one safetensors file and a manifest. It is written beside its place under another
name, synced, and renamed when it is whole: what was interrupted is never taken for complete. What lies in the
checkpoint as it is loaded is not in it. Several processes may use one cache. Called by the compute thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from planner.digests import sample_file
from planner.headers import CONFIG_NAME, read_checkpoint
from planner.load_options import LoadOptions
from shard_loader.cache_home import user_cache_dir
from shard_loader.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1
_HUB_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # how blobs of the hub's cache are named
DEFAULT_MAX_BYTES = 100 * 10**9
MAX_FREE_BYTES = 10 * 10**9  # left free on the disk: this, or a twentieth of it where that is less
WORTH_SHARE = 0.1  # of a shard's bytes that loading must have made for a cache to pay
STALE_S = 24 * 3600.0  # then an unfinished entry of another machine is removed
MANIFEST, DATA = "manifest.json", "shard.safetensors"


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where the cache is, and whether it is used: None means where it pays."""

    folder: Path
    is_on: bool | None = None
    max_bytes: int = DEFAULT_MAX_BYTES

    @classmethod
    def of(
        cls, is_on: bool | None = None, folder: str | None = None, max_gb: float | None = None
    ) -> CacheSettings:
        """From the configuration; without a folder there, the default one."""
        path = (Path(folder) if folder else default_folder()).expanduser()
        return cls(path, is_on, DEFAULT_MAX_BYTES if max_gb is None else int(max_gb * 1e9))

    def is_worth(self, made_bytes: int, total_bytes: int) -> bool:
        """Whether a shard of which `made_bytes` differ from the checkpoint is to be kept."""
        if self.is_on is None:
            return made_bytes >= WORTH_SHARE * total_bytes
        return self.is_on and made_bytes > 0


def default_folder() -> Path:
    """In MACRAME_CACHE, or else where this user's programs cache."""
    own = os.environ.get("MACRAME_CACHE")
    return (Path(own) if own else user_cache_dir()) / "shards"


def entry_key(model_dir: Path, layers: tuple[int, int], options: LoadOptions) -> str:
    """32 hex digits of all that the bytes of an entry depend on.

    Files are told apart by what the hub says of them where they come from there, else by name, size, time of
    change and samples of their bytes.
    """
    fields = {
        "format": FORMAT,
        "config": hashlib.sha256((model_dir / CONFIG_NAME).read_bytes()).hexdigest(),
        "files": _file_keys(model_dir),
        "layers": layers,
        "options": asdict(options),
        "device": str(mx.default_device()),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "macrame")},
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _file_keys(model_dir: Path) -> list[tuple[str, int, object]]:
    store = Store.open(model_dir)
    found: list[tuple[str, int, object]] = []
    for name in sorted({header.file for header in read_checkpoint(model_dir).headers.values()}):
        path = (model_dir / name).resolve()
        stat = path.stat()
        what: object
        if store is not None and name in store.manifest.files:
            what = store.manifest.files[name].etag
        elif path.parent.name == "blobs" and _HUB_HASH.fullmatch(path.name):
            what = path.name
        else:
            what = [stat.st_mtime_ns, sample_file(path)]
        found.append((name, stat.st_size, what))
    return found


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete entry."""

    path: Path
    sums: dict[str, int]  # CRC-32 of each tensor
    data_bytes: int

    @property
    def data(self) -> Path:
        """Its safetensors file."""
        return self.path / DATA


def find_entry(settings: CacheSettings, key: str) -> Entry | None:
    """The entry of `key`, marked as used now; None, and what is there is removed, where it is not whole."""
    path = settings.folder / key
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        entry = Entry(path, {str(k): int(v) for k, v in manifest["sums"].items()}, int(manifest["bytes"]))
        size = entry.data.stat().st_size
    except FileNotFoundError:
        if not (path / MANIFEST).exists():  # another process may have made it just now
            drop_entry(path)
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("the cache entry %s cannot be read and is made again", path)
        drop_entry(path)
        return None
    if size != entry.data_bytes:
        logger.warning("the cache entry %s has %d of %d bytes: made again", path, size, entry.data_bytes)
        drop_entry(path)
        return None
    try:
        os.utime(path / MANIFEST)
    except OSError:  # a cache that may only be read is used all the same
        logger.debug("the cache entry %s cannot be marked as used", path)
    return entry


def drop_entry(path: Path) -> None:
    """Remove an entry; what reads it now may go on."""
    if path.exists():
        shutil.rmtree(path, ignore_errors=True)


def make_room(settings: CacheSettings, need_bytes: int) -> str:
    """Removes the longest unused entries beyond the bound, and what was never finished.

    Returns why there is no room for `need_bytes` more, or an empty string.
    """
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in settings.folder.glob("tmp-*"):
        if _is_abandoned(path):
            drop_entry(path)
    if need_bytes > settings.max_bytes:
        return f"it would take {need_bytes / 1e9:.1f} GB, the bound is {settings.max_bytes / 1e9:.1f} GB"
    entries = sorted(_entries(settings.folder))
    kept_bytes = sum(nbytes for _, nbytes, _ in entries)
    for _, nbytes, path in entries:
        if kept_bytes + need_bytes <= settings.max_bytes:
            break
        logger.info("the cache entry %s is removed: it was not used for the longest time", path)
        drop_entry(path)
        kept_bytes -= nbytes
    disk = shutil.disk_usage(settings.folder)
    if disk.free - need_bytes < min(MAX_FREE_BYTES, disk.total // 20):
        return f"the disk has {disk.free / 1e9:.1f} GB free, too few for {need_bytes / 1e9:.1f} GB more"
    return ""


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each complete entry was used, its bytes, and its folder."""
    for manifest in folder.glob(f"*/{MANIFEST}"):
        if not manifest.parent.name.startswith("tmp-"):
            try:
                yield manifest.stat().st_mtime, (manifest.parent / DATA).stat().st_size, manifest.parent
            except OSError:  # another process has just removed it
                continue


def new_folder(settings: CacheSettings) -> Path:
    """A folder to write an entry in, by a name that says who writes."""
    path = settings.folder / f"tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    return path


def _is_abandoned(path: Path) -> bool:
    try:
        host, pid, _ = path.name.removeprefix("tmp-").rsplit("-", 2)
        if host == socket.gethostname():
            os.kill(int(pid), 0)
            return False
        return time.time() - path.stat().st_mtime > STALE_S
    except (ProcessLookupError, ValueError):
        return True
    except OSError:  # somebody else's process, or gone meanwhile
        return False


def sync(path: Path) -> None:
    """What was written there is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_json(sums: Mapping[str, int], data_bytes: int) -> str:
    """A manifest."""
    value: dict[str, Any] = {"format": FORMAT, "bytes": data_bytes, "sums": dict(sums)}
    return json.dumps(value)
