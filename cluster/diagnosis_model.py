"""Doctor's check of the model's files on this machine, without asking the hub. Any thread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.console import as_word
from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.routes import HEAD_RANK
from planner.headers import ModelFilesError, read_config, read_headers
from planner.sizes import gb
from shard_loader.folder import find_folder
from shard_loader.sources import HubError
from shard_loader.store import Store

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where the config's model is here. is_own_folder: the config names a folder, not a hub id."""

    folder: Path | None
    is_own_folder: bool = False
    store: Store | None = None  # which may hold only a part


def whereabouts(config: ClusterConfig, name: str | None = None) -> Whereabouts:
    """Looks at this machine alone, for the config's model or another one that it names.

    Raises HubError for what is neither a folder nor a hub id.
    """
    name = config.model if name is None else name
    folder = find_folder(name, config.model_dir_base)
    if folder is not None:
        return Whereabouts(folder, is_own_folder=True)
    from shard_loader.hub import cached_snapshot, stored  # huggingface_hub takes a while

    cached = cached_snapshot(name)
    if cached is not None:
        return Whereabouts(cached)
    place = stored(name)
    return Whereabouts(None) if place is None else Whereabouts(place.folder, store=place.store)


def lacking_bytes(found: Whereabouts) -> int:
    """Bytes of the whole model that a store does not have; 0 where that is not known, too."""
    if found.store is None:
        return 0
    store, files = found.store, found.store.manifest.files
    here = sum(stop - start for name in files for start, stop in store.covered(name))
    return max(0, sum(entry.size for entry in files.values()) - here)


def model(subject: Subject) -> Iterable[Finding]:
    """That config, weights and tokenizer are whole, by names, sizes and headers."""
    config = subject.config
    if config is None:
        yield skipped("model", subject.why_no_nodes)
        return
    try:
        found = whereabouts(config)
    except HubError as error:
        yield _wrong(str(error), "no node can start without the model", f'"model": ...    # in {config.path}')
        return
    if found.folder is None:
        yield skipped(
            "model", f"{config.model} is not here yet: each node fetches its own layers when it starts"
        )
        return
    wrong = list(_files(config, found, found.folder, HEAD_RANK in subject.ranks or not subject.ranks))
    yield from [*wrong, *_adapters(config)]
    if not wrong:
        part = lacking_bytes(found)
        more = f"; {gb(part)} of it are not here, and are fetched if this node is given them" if part else ""
        yield fine("model", f"the files in {found.folder} are whole by names, sizes and headers{more}")
        yield skipped(
            "model contents", "every byte would have to be read; nodes compare samples when they load"
        )


def _files(config: ClusterConfig, found: Whereabouts, folder: Path, is_head: bool) -> Iterable[Finding]:
    again = _again(config, found, folder)
    try:
        read_config(folder)
        read_headers(folder)
    except ModelFilesError as error:
        yield _wrong(str(error), "the node that owns these layers cannot load them", again)
    if is_head and not any(any(folder.glob(name)) for name in TOKENIZERS):
        yield _wrong(
            f"{folder} has no tokenizer ({TOKENIZERS[0]} or another)",
            "the head cannot turn text into tokens, and its HTTP API does not start",
            again,
        )


def _adapters(config: ClusterConfig) -> Iterable[Finding]:
    for adapter in config.adapters:
        if not (adapter.path / "adapters.safetensors").is_file():
            yield _wrong(
                f"the adapter {adapter.name!r} has no {adapter.path / 'adapters.safetensors'}",
                "every node that owns layers loads its part of it, and cannot start without",
                f"ls {as_word(adapter.path)}    # copy the adapter there, or take it out of load.adapters",
            )


def _again(config: ClusterConfig, found: Whereabouts, folder: Path) -> str:
    if found.is_own_folder:
        here = as_word(folder)
        return f"copy the model to {folder} again: rsync -a --checksum OTHER:{here}/ {here}/"
    return f"rm -r {as_word(folder)}    # {config.model} is fetched again when the node starts"


def _wrong(what: str, why: str, mend: str) -> Finding:
    return Finding("model", "error", what, why, mend)
