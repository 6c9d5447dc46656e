"""The Hugging Face hub as a source of byte ranges, through huggingface_hub's own client.

That client brings the endpoint (HF_ENDPOINT), the token (HF_TOKEN or a login), HF_HUB_OFFLINE, proxies and
the shapes of the hub's refusals; this module adds ranges that go on where a connection broke. Any thread.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from shard_loader.sources import HUB, FetchStoppedError, HubError, MissingFileError
from shard_loader.spans import Span
from shard_loader.store import FileEntry, Manifest, is_file_name

HttpError: type[Exception] = HfHubHTTPError.__mro__[
    1
]  # of the HTTP client that this huggingface_hub is built on
MAX_TRIES = 6  # without a byte between them
MAX_CONNECTS = 3
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 8.0
MAX_RETRY_AFTER_S = 300.0
TIMEOUT_S = 30.0  # to connect, and between two blocks
_IS_AGAIN = (408, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _AgainError(Exception):
    """This try failed in a way that the next one need not."""

    def __init__(self, reason: str, wait_s: float | None = None, *, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.is_unreachable = wait_s, is_unreachable


class HubSource:
    """One model on the hub. `endpoint`: another hub than HF_ENDPOINT's."""

    label = HUB

    def __init__(self, *, endpoint: str | None = None) -> None:
        self._endpoint = endpoint or constants.ENDPOINT
        self._lock = threading.Lock()
        self._patient_until = 0.0
        self.fetched_bytes = 0

    @property
    def is_patient(self) -> bool:
        """Whether the hub asked to be left alone for a while."""
        return time.monotonic() < self._patient_until

    def manifest(self, model: str, revision: str) -> Manifest:
        """The commit and its files, in one request."""
        never = threading.Event()
        waits = _Waits(self._wait, never)
        while True:
            try:
                info = HfApi(endpoint=self._endpoint).model_info(
                    model, revision=revision or None, files_metadata=True, timeout=TIMEOUT_S
                )
                break
            except (HttpError, OSError, ValueError) as error:
                waits.again(_classify(error, model, "", revision))
        if not info.sha:
            raise HubError(f"{self._endpoint} does not say which commit of {model} it has")
        entries = (_entry(sibling) for sibling in info.siblings or ())
        return Manifest(model, info.sha, {entry.name: entry for entry in entries if entry is not None})

    def spans(self, manifest: Manifest, entry: FileEntry) -> list[Span]:
        """The hub has all of it."""
        return [(0, entry.size)]

    def read(
        self, manifest: Manifest, entry: FileEntry, start: int, stop: int, stopping: threading.Event
    ) -> Iterator[bytes]:
        """A range; goes on where a connection broke, and waits as long as the hub says."""
        waits = _Waits(self._wait, stopping)
        while start < stop:
            try:
                for block in self._read_once(manifest, entry, start, stop):
                    start += len(block)
                    waits.reset()
                    with self._lock:
                        self.fetched_bytes += len(block)
                    yield block
                    if stopping.is_set():
                        raise FetchStoppedError("the fetch was stopped")
            except (HttpError, OSError) as error:
                waits.again(_classify(error, manifest.model, entry.name, manifest.revision))
            except _AgainError as error:
                waits.again(error)

    def _read_once(self, manifest: Manifest, entry: FileEntry, start: int, stop: int) -> Iterator[bytes]:
        url = hf_hub_url(manifest.model, entry.name, revision=manifest.revision, endpoint=self._endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            _check_answer(response, manifest, entry, start, stop)
            left = stop - start
            for block in response.iter_raw():
                if len(block) > left:
                    raise HubError(
                        f"{self._endpoint} sent more of {entry.name} than was asked for; try again"
                    )
                left -= len(block)
                yield block
        if left:
            raise _AgainError(f"{entry.name} ended {left} bytes too early")

    def _wait(self, wait_s: float, is_asked: bool, stopping: threading.Event) -> None:
        if is_asked:
            self._patient_until = max(self._patient_until, time.monotonic() + wait_s)
        if stopping.wait(wait_s):
            raise FetchStoppedError("the fetch was stopped")


class _Waits:
    """How often a request has failed in a row, and how long to wait before the next try."""

    def __init__(
        self, wait: Callable[[float, bool, threading.Event], None], stopping: threading.Event
    ) -> None:
        self._wait, self._stopping = wait, stopping
        self._num_failed = 0

    def reset(self) -> None:
        """It works again."""
        self._num_failed = 0

    def again(self, error: _AgainError) -> None:
        """Wait, or give up with the sentence that this failure is."""
        self._num_failed += 1
        if error.is_unreachable and self._num_failed >= MAX_CONNECTS:
            raise HubError(
                f"the Hugging Face hub cannot be reached ({error}): connect this machine, or fetch the model "
                "elsewhere and name its folder"
            ) from error
        if self._num_failed >= MAX_TRIES:
            raise HubError(
                f"the Hugging Face hub failed {MAX_TRIES} times in a row: {error}; try again later, "
                "what was fetched is kept"
            ) from error
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (self._num_failed - 1))
        asked_s = error.wait_s
        self._wait(
            wait_s if asked_s is None else min(asked_s, MAX_RETRY_AFTER_S),
            asked_s is not None,
            self._stopping,
        )


def _entry(sibling: Any) -> FileEntry | None:
    """None for what no model folder of ours holds: most files in folders, and names that hide."""
    if not is_file_name(sibling.rfilename) or sibling.size is None:
        return None
    etag = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
    return FileEntry(sibling.rfilename, sibling.size, etag or "")


def _check_answer(response: Any, manifest: Manifest, entry: FileEntry, start: int, stop: int) -> None:
    """The range that was asked for, of the file that the manifest names. Raises HubError."""
    place = f"{entry.name} of {manifest.model}"
    given = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code != 206 or given is None:
        if response.status_code == 200 and (start, stop) == (0, entry.size):
            given = None
        else:
            raise HubError(f"the hub does not send ranges of {place}: it answers {response.status_code}")
    length = response.headers.get("content-length")
    if given is None:
        size = int(length) if length is not None and length.isdecimal() else entry.size
    else:
        size = int(given[3])
        if (int(given[1]), int(given[2]) + 1) != (start, stop):
            raise HubError(f"the hub sends other bytes of {place} than those asked for: {given[0]}")
        if length is not None and length != str(stop - start):
            raise HubError(f"the hub sends {length} bytes of {place} where {stop - start} were asked for")
    first = response.history[0] if response.history else response
    etag = _plain_etag(
        first.headers.get("x-linked-etag") or ("" if response.history else response.headers.get("etag", ""))
    )
    is_other = bool(entry.etag and etag and len(etag) == len(entry.etag) and etag != entry.etag)
    if size != entry.size or is_other:
        raise HubError(
            f"{place} has changed on the hub since this fetch began (it had {entry.size} bytes, etag "
            f"{entry.etag[:12]}; now {size}, etag {etag[:12]}); remove the folder of revision "
            f"{manifest.revision} in macrame's cache and start again"
        )


def _plain_etag(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _classify(error: Exception, model: str, file: str, revision: str) -> _AgainError:
    """The failure as one that may pass; raises HubError for one that stays."""
    what = f"{file} of {model}" if file else model
    if isinstance(error, GatedRepoError):
        raise HubError(
            f"{model} asks you to accept its licence: do so on https://huggingface.co/{model}, "
            "then run `hf auth login`, or set HF_TOKEN, on this machine"
        ) from error
    if isinstance(error, RepositoryNotFoundError):
        raise HubError(
            f"{model} is neither a folder here nor a model on the Hugging Face hub; for a private one run "
            "`hf auth login`"
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise HubError(f"the Hugging Face hub has no revision {revision} of {model}") from error
    if isinstance(error, OfflineModeIsEnabled):
        raise HubError(
            f"{what} is not in the local cache, and HF_HUB_OFFLINE keeps this machine from the Hugging Face "
            f"hub: fetch it with `hf download {model}`, name a folder, or unset HF_HUB_OFFLINE"
        ) from error
    if isinstance(error, HfHubHTTPError):
        return _refuse(error, what)
    if isinstance(error, ValueError):
        raise HubError(f"{model} cannot be looked up: {_first_line(error)}") from error
    # By name: the class is that of the HTTP client that this huggingface_hub is built on.
    return _AgainError(_first_line(error), is_unreachable=type(error).__name__.startswith("Connect"))


def _refuse(error: HfHubHTTPError, what: str) -> _AgainError:
    """For an answer of the hub that may be another next time; raises HubError for any other."""
    status = error.response.status_code
    if isinstance(error, RemoteEntryNotFoundError) or status == 404:
        raise MissingFileError(f"{what} is missing on the Hugging Face hub (404)") from error
    if status not in _IS_AGAIN:
        raise HubError(f"the Hugging Face hub refuses {what}: {_first_line(error)}") from error
    after = error.response.headers.get("retry-after", "").strip()
    wait_s = float(after) if after.isdecimal() else None
    return _AgainError(f"{what}: HTTP {status}", wait_s)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
