"""Where a model's bytes come from: what the hub and other nodes have in common. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

from shard_loader.spans import Span
from shard_loader.store import FileEntry, Manifest

HUB = "the Hugging Face hub"  # the label of the source that has everything


class HubError(ValueError):
    """A model that is neither here nor to be had; one sentence that says what to do."""


class PeerError(HubError):
    """What another node cannot give; the hub's own word counts for more."""


class MissingFileError(HubError):
    """The revision has no such file."""


class FetchStoppedError(HubError):
    """The fetch was told to stop; what it has is kept."""


class Source(Protocol):
    """Something that has files of a model. `label` names it in sentences."""

    label: str

    @property
    def is_patient(self) -> bool:
        """Whether it waits because it was told to (HTTP's Retry-After): that is no stall."""

    def manifest(self, model: str, revision: str) -> Manifest:
        """The files of a revision; an empty revision: of the one the source would give.

        Raises HubError where the source has none.
        """

    def spans(self, manifest: Manifest, entry: FileEntry) -> list[Span]:
        """What of the file it can give. Raises nothing: a source that is gone has nothing."""

    def read(
        self, manifest: Manifest, entry: FileEntry, start: int, stop: int, stopping: threading.Event
    ) -> Iterator[bytes]:
        """The bytes [start, stop) in order, in blocks of any size.

        Raises MissingFileError, FetchStoppedError, or HubError where another try would not help.
        """
