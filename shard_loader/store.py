"""The folder of a model of which only some bytes are here: a checkpoint in Hugging Face layout whose
safetensors are sparse files of the right size with the right header, a manifest and a journal.

mlx-lm reads it as any other folder, lazily; what is a hole is never read, because `shard_loader.absent` puts
tensors that are not in the journal out of reach. It lies beside the Hugging Face cache, not in it:
    $MACRAME_CACHE or the hub cache's sibling `macrame`/models--ORG--NAME/REVISION/
Any thread may call; several processes may share a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants

from shard_loader.journal import Journal, Record
from shard_loader.spans import Span, covers
from shard_loader.whole_file import write_whole

FOLDER = ".macrame"  # in the model folder: what is ours and no file of the model
MANIFEST = "manifest.json"
REVISION = re.compile(r"[0-9a-f]{40}")
# An embedding model says in such a folder how its vectors are made (sentence-transformers' layout).
_FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*|[0-9]{1,2}_[A-Za-z]+/config\.json")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a revision. etag: the sha256 of a large file, git's blob id of a small one, or empty."""

    name: str
    size: int
    etag: str = ""

    def matches(self, path: Path, on_block: Callable[[], None] = lambda: None) -> bool:
        """Whether the whole file at `path` is this one; an etag of another form proves nothing."""
        if path.stat().st_size != self.size:
            return False
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.etag):
            return True
        digest = hashlib.sha256() if len(self.etag) == 64 else hashlib.sha1(f"blob {self.size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                on_block()
        return digest.hexdigest() == self.etag


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one revision of a model, by name."""

    model: str
    revision: str
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        if not REVISION.fullmatch(self.revision):
            raise ValueError(f"revision = {self.revision!r} is no commit of 40 hex digits")
        for name, entry in self.files.items():
            if not is_file_name(name) or name != entry.name or entry.size < 0:
                raise ValueError(f"{name!r} is no file of a model folder")


def is_file_name(name: str) -> bool:
    """Whether `name` may be a file of a store: one component that hides nothing, or a module's config."""
    return _FILE_NAME.fullmatch(name) is not None


def store_root() -> Path:
    """Where stores lie on this machine."""
    own = os.environ.get("MACRAME_CACHE")
    return Path(own).expanduser() if own else Path(constants.HF_HUB_CACHE).with_name("macrame")


def model_folder(model: str, root: Path | None = None) -> Path:
    """The folder of all revisions of a hub id."""
    return (root or store_root()) / f"models--{model.replace('/', '--')}"


class Store:
    """One revision's folder. `open` finds one that is there, `create` makes one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.journal = Journal(folder / FOLDER / "journal")

    @classmethod
    def open(cls, folder: Path) -> Store | None:
        """The store in `folder`; None where there is none that was prepared."""
        try:
            raw = json.loads((folder / FOLDER / MANIFEST).read_text(encoding="utf-8"))
            files = {entry["name"]: FileEntry(**entry) for entry in raw["files"]}
            manifest = Manifest(raw["model"], raw["revision"], files)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(folder, manifest)

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> Store:
        """An empty store; it counts as prepared after `seal`."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        return cls(folder, manifest)

    def seal(self) -> None:
        """The small files and the headers are here: from now on `open` finds this store."""
        files = [asdict(entry) for entry in self.manifest.files.values()]
        raw = {"model": self.manifest.model, "revision": self.manifest.revision, "files": files}
        write_whole(self.folder / FOLDER / MANIFEST, json.dumps(raw, indent=1).encode())

    # -- bytes --------------------------------------------------------------------------------------------
    def add_small(self, entry: FileEntry, data: bytes) -> bool:
        """Keep a whole small file; False, and nothing is kept, if these are not its bytes."""
        path = self.folder / entry.name
        partial = self.folder / FOLDER / f"{entry.name.replace('/', '.')}.{os.getpid()}"
        partial.write_bytes(data)
        is_it = entry.matches(partial)
        if is_it:
            path.parent.mkdir(exist_ok=True)
            partial.replace(path)
        else:
            partial.unlink()
        return is_it

    def add_sparse(self, entry: FileEntry, header: bytes) -> None:
        """Make a weight file of the right size that holds nothing but its header."""
        path = self.folder / entry.name
        partial = self.folder / FOLDER / f"{entry.name}.{os.getpid()}"
        is_there = path.is_file() and path.stat().st_size == entry.size
        with (
            path.open("r+b") if is_there else partial.open("wb")
        ) as file:  # another process may be filling it
            file.write(header)
            file.truncate(entry.size)
            os.fsync(file.fileno())
        if not is_there:
            self.journal.forget(entry.name, 0, entry.size)  # of a file that was removed or cut short
            partial.replace(path)
        self.journal.add(Record(entry.name, 0, len(header), hashlib.sha256(header).hexdigest()))

    def has(self, entry: FileEntry) -> bool:
        """Whether the file is here: whole if small, else with its header and at its full length."""
        path = self.folder / entry.name
        try:
            if path.stat().st_size != entry.size:
                return False
        except FileNotFoundError:
            return False
        return not entry.name.endswith(".safetensors") or covers(self.journal.covered(entry.name), 0, 8)

    def covered(self, name: str) -> list[Span]:
        """What of a file can be read here."""
        entry = self.manifest.files.get(name)
        if entry is None or not self.has(entry):
            return []
        return self.journal.covered(name) if name.endswith(".safetensors") else [(0, entry.size)]

    def check(self, file: str, spans: list[Span], on_record: Callable[[], None] = lambda: None) -> None:
        """Read again what the journal says of `spans` of one file, and forget what is not that any more."""
        for record in self.journal.records(file):
            is_wanted = any(record.start < stop and start < record.stop for start, stop in spans)
            if is_wanted and _sha256(self.folder / file, record.start, record.stop) != record.sha256:
                self.journal.forget(file, record.start, record.stop)
            on_record()

    # -- fetches under way --------------------------------------------------------------------------------
    @contextlib.contextmanager
    def fetching(self) -> Iterator[bool]:
        """Within the block this process fetches; yields whether an earlier fetch here did not end."""
        mine = self.folder / FOLDER / f"fetching.{os.getpid()}"
        others = [path for path in (self.folder / FOLDER).glob("fetching.*") if not _lives(path)]
        with contextlib.suppress(OSError):  # a disk that cannot be written may still have everything
            mine.touch()
        yield bool(others)  # an exception, as a kill, leaves the mark
        with contextlib.suppress(OSError):
            for path in (*others, mine):
                path.unlink(missing_ok=True)

    def live_fetches(self) -> list[int]:
        """The processes, others than this one, that fetch into this store now."""
        marks = (self.folder / FOLDER).glob("fetching.*")
        return [int(path.name.rpartition(".")[2]) for path in marks if _lives(path)]


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """One process at a time prepares the stores of the model in `folder`, which need not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lives(mark: Path) -> bool:
    pid = mark.name.rpartition(".")[2]
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return int(pid) != os.getpid()


def _sha256(path: Path, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(_READ_BYTES, stop - start))):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()
