"""Which models of the hub lie on this machine's disk, wholly or in part. Reads files; any thread."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from shard_loader.hub import cached_snapshot
from shard_loader.prepare import PATTERNS
from shard_loader.sources import HubError
from shard_loader.spans import total_bytes
from shard_loader.store import REVISION, Store, model_folder, preparing, store_root

HUB_CACHE, OWN_STORE = "hub cache", "macrame"


@dataclass(frozen=True, slots=True)
class KeptModel:
    """One revision. place: HUB_CACHE, which other programs use too, or OWN_STORE."""

    model: str
    revision: str
    place: str
    here_bytes: int
    total_bytes: int  # of all its files; 0: not known
    folder: Path

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is missing."""
        return 0 < self.total_bytes <= self.here_bytes


def inventory(*, cache_dir: Path | None = None, root: Path | None = None) -> list[KeptModel]:
    """All of them, sorted by name. What cannot be read is left out."""
    found = [*_cached(cache_dir), *_stored(root or store_root())]
    return sorted(found, key=lambda kept: (kept.model.lower(), kept.place, kept.revision))


def _stored(root: Path) -> Iterator[KeptModel]:
    for place in sorted(root.glob("models--*")):
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            store = Store.open(folder) if REVISION.fullmatch(folder.name) else None
            if store is None:
                continue
            files = [entry for entry in store.manifest.files.values() if _is_of_model(entry.name)]
            here = sum(total_bytes(store.covered(entry.name)) for entry in files)
            whole = sum(entry.size for entry in files)
            yield KeptModel(store.manifest.model, folder.name, OWN_STORE, here, whole, folder)


def _is_of_model(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in PATTERNS)


def _cached(cache_dir: Path | None) -> Iterator[KeptModel]:
    """Those with safetensors: nothing else can be loaded."""
    try:
        cache = scan_cache_dir(cache_dir or constants.HF_HUB_CACHE)
    except (CacheNotFound, OSError, ValueError):
        return
    for repo in cache.repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            files = [file for file in revision.files if _is_of_model(file.file_name)]
            if not any(file.file_name.endswith(".safetensors") for file in files):
                continue
            here = sum(file.size_on_disk for file in files)
            try:
                is_whole = cached_snapshot(repo.repo_id, revision.commit_hash, cache_dir) is not None
            except HubError:
                is_whole = False
            yield KeptModel(
                repo.repo_id,
                revision.commit_hash,
                HUB_CACHE,
                here,
                here if is_whole else 0,
                revision.snapshot_path,
            )


def remove_stored(model: str, root: Path | None = None) -> int:
    """Removes all that macrame's own store has of a model; the bytes that this freed.

    Raises HubError where there is nothing, where a process fetches it now, and where it cannot be removed.
    """
    place = model_folder(model, root)
    kept = [one for one in _stored(root or store_root()) if one.model == model]
    if not place.is_dir():
        raise HubError(f"nothing of {model} is in {root or store_root()}")
    with preparing(place):
        for one in kept:
            store = Store.open(one.folder)
            fetching = [] if store is None else store.live_fetches()
            if fetching:
                raise HubError(
                    f"process {fetching[0]} is fetching {model} now: stop it first, or wait until it is done"
                )
        try:
            shutil.rmtree(place)
        except OSError as error:
            raise HubError(f"{error.filename or place} cannot be removed: {error.strerror}") from error
    return sum(one.here_bytes for one in kept)
