"""Fetches the byte ranges of own tensors into a store: from peers where they have them, else from the hub.

`fetch_tensors` runs on its caller's thread, with a few threads of its own that read from the network and
write to disk. Touches no MLX.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from planner.headers import TensorHeader, read_checkpoint
from planner.missing import missing_tensors
from shard_loader.recorder import PIECE_BYTES, Recorder
from shard_loader.sources import HUB, FetchStoppedError, HubError, Source
from shard_loader.spans import Span, coalesce, covers, intersect, pieces, subtract, total_bytes
from shard_loader.store import FileEntry, Store

NUM_CONNECTIONS = 4
RUN_BYTES = 128 << 20  # that one request asks for at most: hubs count requests
WATCH_S = 0.2
SPARE_BYTES = 64 << 20  # of the disk, besides what is fetched

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Fetched:
    """What a fetch brought: bytes by the label of their source."""

    by_source: dict[str, int]
    wanted_bytes: int = 0
    were_here_bytes: int = 0

    @property
    def from_hub(self) -> int:
        """Bytes from the hub."""
        return self.by_source.get(HUB, 0)

    @property
    def from_peers(self) -> int:
        """Bytes from other nodes."""
        return sum(self.by_source.values()) - self.from_hub


def wanted_spans(store: Store, tensors: Iterable[str]) -> dict[str, list[Span]]:
    """The bytes of the tensors, file by file; small gaps between them count as wanted too.

    Raises HubError naming a tensor and its file where the file is missing at the source.
    """
    headers = read_checkpoint(store.folder).headers
    spans: dict[str, list[Span]] = {}
    for name in sorted(tensors):
        header = headers.get(name)
        if header is None:
            raise HubError(_missing_sentence(store, name))
        spans.setdefault(header.file, []).append((header.start, header.start + header.nbytes))
    return {file: coalesce(ranges) for file, ranges in spans.items()}


def fetch_tensors(
    store: Store,
    tensors: Iterable[str],
    sources: Sequence[Source],
    on_progress: Progress = lambda fetched, total: None,
    stopping: threading.Event | None = None,
) -> Fetched:
    """Until every byte of `tensors` is in the store, or HubError.

    Each range is taken from the first of `sources` that has it, and from the next one where that fails. What
    is there already is not fetched again; after a fetch that did not end it is read and checked first.
    on_progress(here_bytes, wanted_bytes): first what is here, then as it grows; also called, unchanged,
    while a source was told to wait. `stopping` ends the fetch early with FetchStoppedError.
    """
    wanted = wanted_spans(store, tensors)
    with store.fetching() as was_cut_short:
        store.journal.reload()
        if was_cut_short:
            for file, spans in wanted.items():
                store.check(file, spans, lambda: on_progress(0, 0))
        missing = {file: store.journal.missing(file, spans) for file, spans in wanted.items()}
        _check_disk(store, sum(map(total_bytes, missing.values())))
        job = _Job(store, sources, stopping or threading.Event(), Fetched({}))
        job.result.wanted_bytes = sum(map(total_bytes, wanted.values()))
        job.result.were_here_bytes = job.result.wanted_bytes - sum(map(total_bytes, missing.values()))
        job.run(missing, on_progress)
        for file in wanted:
            if missing[file] or was_cut_short:
                _check_whole_file(store, store.manifest.files[file], job.report)
    return job.result


class _Job:
    """One fetch: its runs of bytes, each with the sources that may have it."""

    def __init__(
        self, store: Store, sources: Sequence[Source], stopping: threading.Event, result: Fetched
    ) -> None:
        self._store, self._sources, self.result = store, sources, result
        self._asked, self._stop = stopping, threading.Event()
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._on_progress: Progress = lambda here, wanted: None

    def report(self) -> None:
        """Say how far it is."""
        self._on_progress(self.result.were_here_bytes + self._num_bytes, self.result.wanted_bytes)

    def run(self, missing: Mapping[str, Sequence[Span]], on_progress: Progress) -> None:
        """Fetch everything that is missing; raises the first failure after all threads have ended."""
        self._on_progress = on_progress
        self.report()
        share_bytes = sum(map(total_bytes, missing.values())) // (2 * NUM_CONNECTIONS)
        run_bytes = min(RUN_BYTES, max(PIECE_BYTES, share_bytes))
        work = [
            (self._store.manifest.files[file], piece, from_source)
            for file, spans in missing.items()
            for from_source, mine in self._shares(self._store.manifest.files[file], spans)
            for piece in pieces(mine, run_bytes)
        ]
        if not work:
            return
        with ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="fetch") as pool:
            futures: set[Future[None]] = {pool.submit(self._fetch, *piece) for piece in work}
            shown = 0
            try:
                while futures:
                    done, futures = wait(futures, WATCH_S, FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    if self._asked.is_set():
                        raise FetchStoppedError("the fetch was stopped")
                    if self._num_bytes != shown or any(source.is_patient for source in self._sources):
                        shown = self._num_bytes
                        self.report()
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()
        self.report()

    def _shares(self, entry: FileEntry, spans: Sequence[Span]) -> Iterable[tuple[int, list[Span]]]:
        """Which source, by its place, is asked first for which of the spans."""
        left = list(spans)
        for place, source in enumerate(self._sources):
            share = intersect(left, source.spans(self._store.manifest, entry))
            if share:
                yield place, share
                left = subtract(left, share)
        if left:
            yield len(self._sources), left

    def _fetch(self, entry: FileEntry, run: Span, from_source: int) -> None:
        """One run, from its source and, where that fails, the rest from those after it."""
        errors: list[HubError] = []
        try:
            with Recorder(self._store, entry, run[0]) as recorder:
                for source in self._sources[from_source:]:
                    if not covers(source.spans(self._store.manifest, entry), recorder.at, run[1]):
                        continue
                    try:
                        self._copy(source, entry, run[1], recorder)
                    except HubError as error:
                        errors.append(error)
                    if self._stop.is_set() or recorder.at == run[1]:
                        return
        except OSError as error:
            raise HubError(
                f"{entry.name} cannot be written in {self._store.folder}: {error.strerror}"
            ) from error
        if errors:
            raise errors[-1]
        raise HubError(
            f"no node has bytes {recorder.at} to {run[1]} of {entry.name} of {self._store.manifest.model}"
        )

    def _copy(self, source: Source, entry: FileEntry, stop: int, recorder: Recorder) -> None:
        for block in source.read(self._store.manifest, entry, recorder.at, stop, self._stop):
            recorder.write(block)
            self._count(source.label, len(block))

    def _count(self, label: str, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
            self.result.by_source[label] = self.result.by_source.get(label, 0) + num_bytes


def _check_disk(store: Store, missing_bytes: int) -> None:
    free_bytes = shutil.disk_usage(store.folder).free
    if missing_bytes and missing_bytes + SPARE_BYTES > free_bytes:
        raise HubError(
            f"{store.manifest.model} needs {missing_bytes} more bytes in {store.folder}, whose disk has "
            f"{free_bytes} free: make room there, or set MACRAME_CACHE to a folder on a larger disk"
        )


def _check_whole_file(store: Store, entry: FileEntry, on_block: Callable[[], None]) -> None:
    """A file that is whole now is what the hub says it is; one that is not is forgotten, and refused."""
    is_whole = covers(store.journal.covered(entry.name), 0, entry.size)
    if not is_whole or entry.matches(store.folder / entry.name, on_block):
        return
    store.journal.forget(entry.name, 8, entry.size)
    raise HubError(
        f"{entry.name} of {store.manifest.model} is whole, but not the file that the hub announced (its "
        "sha256 differs): it will be fetched again at the next start"
    )


def _missing_sentence(store: Store, tensor: str) -> str:
    lost: Mapping[str, TensorHeader] = missing_tensors(store.folder)
    file = lost[tensor].file if tensor in lost else "no file"
    model, revision = store.manifest.model, store.manifest.revision
    return (
        f"{tensor} is in {file}, which is missing on the Hugging Face hub (404): {model} at {revision[:12]}"
    )
