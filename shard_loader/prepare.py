"""Makes a store ready for planning: small files whole, and of each weight file nothing but its header.

Several files at once, on threads of its own. Touches no MLX.
"""

from __future__ import annotations

import fnmatch
import json
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planner.headers import INDEX_NAME, MAX_HEADER_BYTES
from shard_loader.sources import HubError, MissingFileError, PeerError, Source
from shard_loader.spans import covers
from shard_loader.store import FileEntry, Manifest, Store

# What a model is made of; the same files that mlx-lm fetches, but no code.
PATTERNS = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
SMALL_BYTES = 256_000_000  # no tokenizer is larger
NUM_AT_ONCE = 8
_WEIGHTS = "model*.safetensors"
_PREFIX_BYTES = 8  # of a safetensors file: the length of its header


def is_prepared(store: Store) -> bool:
    """Whether every small file and every header is there, but for files that no source had."""
    if not all(store.has(entry) for entry in _small(store.manifest)):
        return False
    weights = [entry for entry in weight_files(store) if entry and (store.folder / entry.name).exists()]
    return bool(weights) and all(store.has(entry) for entry in weights)


def ask_again(store: Store, sources: Sequence[Source]) -> None:
    """Try once more to get the headers of files that no source had."""
    lost = [entry for entry in weight_files(store) if entry is not None and not store.has(entry)]
    _each(lambda entry: _fetch_header(store, entry, sources), lost)


def prepare(
    place: Path, model: str, revision: str, sources: Sequence[Source], on_step: Callable[[], None]
) -> Store:
    """The store in `place`/REVISION with small files and headers, from the first of `sources` that has them.

    A weight file that no source has stays missing: only the node that owns it needs it. Raises HubError.
    """
    manifest = _manifest(model, revision, sources)
    store = Store.create(place / manifest.revision, manifest)
    if "config.json" not in manifest.files:
        raise HubError(f"{model} has no config.json on the hub: it is no model that mlx-lm can read")

    def small(entry: FileEntry) -> None:
        if not store.has(entry):
            _fetch_small(store, entry, sources)
        on_step()

    def header(entry: FileEntry) -> None:
        if not store.has(entry):
            _fetch_header(store, entry, sources)
        on_step()

    _each(small, _small(manifest))
    weights = weight_files(store)
    if not any(weights):
        raise HubError(f"{model} has no model*.safetensors on the hub: convert it with mlx_lm.convert")
    _each(header, [entry for entry in weights if entry is not None])
    store.seal()
    return store


def weight_files(store: Store) -> list[FileEntry | None]:
    """The files that hold the weights, by the index or, without one, by name; None: not in the revision."""
    index = store.folder / INDEX_NAME
    files = store.manifest.files
    if INDEX_NAME not in files:
        return [files[name] for name in sorted(fnmatch.filter(files, _WEIGHTS))]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{INDEX_NAME} of {store.manifest.model} cannot be read: {error}") from error
    return [files.get(name) for name in names]


def _manifest(model: str, revision: str, sources: Sequence[Source]) -> Manifest:
    errors: list[HubError] = []
    for source in sources:
        try:
            return source.manifest(model, revision)
        except HubError as error:
            errors.append(error)
    raise _main_reason(errors)


def _small(manifest: Manifest) -> list[FileEntry]:
    return [
        entry
        for name, entry in sorted(manifest.files.items())
        if entry.size <= SMALL_BYTES
        and not name.endswith(".safetensors")
        and any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS)
    ]


def _fetch_small(store: Store, entry: FileEntry, sources: Sequence[Source]) -> None:
    data = _read(store.manifest, entry, 0, entry.size, sources)
    if not store.add_small(entry, data):
        raise HubError(
            f"{entry.name} of {store.manifest.model} came with other bytes than were announced: start again"
        )


def _fetch_header(store: Store, entry: FileEntry, sources: Sequence[Source]) -> None:
    what = f"{entry.name} of {store.manifest.model}"
    try:
        if entry.size < _PREFIX_BYTES:
            raise HubError(f"{what} has {entry.size} bytes and is no safetensors file")
        prefix = _read(store.manifest, entry, 0, _PREFIX_BYTES, sources)
        (header_bytes,) = struct.unpack("<Q", prefix)
        stop = _PREFIX_BYTES + header_bytes
        if header_bytes > MAX_HEADER_BYTES or stop > entry.size:
            raise HubError(f"{what} is no safetensors file: its header would have {header_bytes} bytes")
        header = _read(store.manifest, entry, _PREFIX_BYTES, stop, sources)
    except MissingFileError:
        return  # planner.missing knows what it must hold, and its owner says that it is missing
    store.add_sparse(entry, prefix + header)


def _read(manifest: Manifest, entry: FileEntry, start: int, stop: int, sources: Sequence[Source]) -> bytes:
    """The bytes [start, stop) from the first source that has them all."""
    if start == stop:
        return b""
    never = threading.Event()
    errors: list[HubError] = []
    for source in sources:
        if not covers(source.spans(manifest, entry), start, stop):
            continue
        try:
            return b"".join(source.read(manifest, entry, start, stop, never))
        except HubError as error:
            errors.append(error)
    raise _main_reason(errors or [HubError(f"nobody has {entry.name} of {manifest.model}")])


def _main_reason(errors: Sequence[HubError]) -> HubError:
    """What the user should read: a file that is not there, else what the hub said; peers come second."""
    missing = (error for error in errors if isinstance(error, MissingFileError))
    of_hub = (error for error in errors if not isinstance(error, PeerError))
    return next(missing, None) or next(of_hub, errors[-1])


def _each(work: Callable[[FileEntry], None], entries: Iterable[FileEntry]) -> None:
    """On several threads; the first failure is raised after all have ended."""
    with ThreadPoolExecutor(NUM_AT_ONCE, thread_name_prefix="headers") as pool:
        for future in [pool.submit(work, entry) for entry in entries]:
            future.result()
