"""From the config's `model` to a folder on this machine: one that is here, cached, or prepared from headers.

May block for as long as small files and headers take; touches no MLX, so any thread may call it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from shard_loader.folder import find_folder
from shard_loader.hub_source import HubSource
from shard_loader.prepare import PATTERNS, is_prepared, prepare
from shard_loader.sources import HubError, Source
from shard_loader.store import REVISION, Store, model_folder, preparing
from shard_loader.whole_file import write_whole

__all__ = [
    "HubError",
    "ModelPlace",
    "cached_snapshot",
    "find_folder",
    "find_model",
    "resolve_model",
    "stored",
]

_PART = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A model folder on this machine. revision: the hub's commit; empty for one that the config names."""

    folder: Path
    revision: str = ""

    @property
    def store(self) -> Store | None:
        """The store that the folder is; None for one in which everything is."""
        return Store.open(self.folder) if self.revision else None


def find_model(
    model: str,
    base: Path,
    *,
    revision: str = "",
    peers: Sequence[Source] = (),
    cache_dir: Path | None = None,
    root: Path | None = None,
    hub: Source | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> ModelPlace:
    """The folder of `model`: a path (relative to `base`, then to the working folder) or a hub id.

    A folder comes first, then the Hugging Face cache where the revision is complete there, then macrame's own
    store, which is made where it is missing: small files and safetensors headers, no weights. `revision` pins
    the commit; empty: the one that is here, else the hub's present one, from then on. `peers` are asked
    before the hub where the revision is known. `on_step` is called after each file. Raises HubError.
    """
    folder = find_folder(model, base)
    if folder is not None:
        return ModelPlace(folder)
    if revision and not REVISION.fullmatch(revision):
        raise HubError(f"{revision!r} is no revision of {model}: a commit has 40 hex digits")
    cached = cached_snapshot(model, revision, cache_dir)
    if cached is not None:
        return ModelPlace(cached, cached.name)
    found = stored(model, revision, root)
    if found is not None:
        return found
    hub = hub or HubSource()
    sources = [*peers, hub] if revision else [hub, *peers]
    place = model_folder(model, root)
    try:
        with preparing(place):
            found = stored(model, revision, root)  # another process may have been faster
            if found is not None:
                return found
            store = prepare(place, model, revision, sources, on_step)
            if not revision or not (place / "main").exists():
                write_whole(place / "main", store.manifest.revision.encode())
            return ModelPlace(store.folder, store.manifest.revision)
    except OSError as error:
        raise HubError(
            f"{model} cannot be kept in {place}: {error.strerror or error}; set MACRAME_CACHE to a folder "
            "that can be written"
        ) from error


def resolve_model(model: str, base: Path) -> Path:
    """The folder of `find_model`: config, tokenizer and headers, though not always weights."""
    return find_model(model, base).folder


def cached_snapshot(model: str, revision: str = "", cache_dir: Path | None = None) -> Path | None:
    """The snapshot in the Hugging Face cache if it is complete, else None."""
    try:
        folder = Path(
            snapshot_download(
                model,
                revision=revision or None,
                cache_dir=cache_dir or constants.HF_HUB_CACHE,
                local_files_only=True,
                allow_patterns=PATTERNS,
            )
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise HubError(f"{model!r} is no hub id: {error}") from error
    is_complete = _first_missing(folder) is None and REVISION.fullmatch(folder.name)
    return folder if is_complete else None


def stored(model: str, revision: str = "", root: Path | None = None) -> ModelPlace | None:
    """The store of a revision, or of the one that was chosen here before; None where none is prepared."""
    place = model_folder(model, root)
    if not revision:
        try:
            revision = (place / "main").read_text(encoding="utf-8").strip()
        except OSError:
            return None
    store = Store.open(place / revision) if REVISION.fullmatch(revision) else None
    if store is None or (store.manifest.model, store.manifest.revision) != (model, revision):
        return None
    if not is_prepared(store):
        return None
    return ModelPlace(store.folder, revision)


def _first_missing(folder: Path) -> str | None:
    """The first file that the model in `folder` needs and does not have."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = {path.name for path in folder.glob("model*.safetensors")}
        part = next(filter(None, map(_PART.fullmatch, names)), None)
        if part is None:
            return None if names else "model.safetensors"
        wanted = (f"model-{i:05d}-of-{part[1]}.safetensors" for i in range(1, int(part[1]) + 1))
        return next((name for name in wanted if name not in names), None)
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"a readable {index.name}"
    return next((file for file in files if not (folder / file).is_file()), None)
