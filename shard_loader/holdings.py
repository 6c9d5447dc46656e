"""What this machine has of a hub model and may give to other nodes: a complete snapshot or a store.

Reads files; any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shard_loader.hub import cached_snapshot, stored
from shard_loader.sources import HubError
from shard_loader.spans import Span, covers
from shard_loader.store import REVISION, FileEntry, Manifest, Store, is_file_name


@dataclass(frozen=True, slots=True)
class Holdings:
    """A folder, the files of its revision, and which bytes of each are here."""

    folder: Path
    manifest: Manifest
    spans: dict[str, list[Span]]

    def read(self, file: str, start: int, stop: int, block_bytes: int) -> Iterator[bytes]:
        """Blocks of a range that is here; raises HubError where it is not, or for a name of no file."""
        entry = self.manifest.files.get(file)
        if entry is None:
            raise HubError(f"{file!r} is no file of {self.manifest.model} at {self.manifest.revision}")
        if not 0 <= start < stop <= entry.size or not covers(self.spans[file], start, stop):
            raise HubError(f"bytes {start} to {stop} of {file} are not here")
        with (self.folder / file).open("rb") as opened:
            opened.seek(start)
            while start < stop:
                block = opened.read(min(block_bytes, stop - start))
                if not block:
                    raise HubError(f"{file} became shorter while it was read")
                start += len(block)
                yield block


def find_holdings(
    model: str, revision: str, *, cache_dir: Path | None = None, root: Path | None = None
) -> Holdings | None:
    """What is here of a revision (empty: of the one that this machine would use); None: nothing."""
    if revision and not REVISION.fullmatch(revision):
        return None
    snapshot = cached_snapshot(model, revision, cache_dir)
    if snapshot is not None:
        paths = [*snapshot.iterdir(), *snapshot.glob("*/config.json")]
        files = {entry.name: entry for path in paths if (entry := _entry(path, snapshot)) is not None}
        manifest = Manifest(model, snapshot.name, files)
        return Holdings(snapshot, manifest, {name: [(0, entry.size)] for name, entry in files.items()})
    place = stored(model, revision, root)
    store = Store.open(place.folder) if place is not None else None
    if store is None:
        return None
    return Holdings(
        store.folder, store.manifest, {name: store.covered(name) for name in store.manifest.files}
    )


def _entry(path: Path, snapshot: Path) -> FileEntry | None:
    """A file of a snapshot: the blob that it links to is named by its etag."""
    name = path.relative_to(snapshot).as_posix()
    if not is_file_name(name) or not path.is_file():
        return None
    return FileEntry(name, path.stat().st_size, path.resolve().name if path.is_symlink() else "")
