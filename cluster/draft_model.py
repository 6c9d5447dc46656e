"""The draft model that the cluster file names: whether it suits the ring's model, and where its files are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.config_read import ConfigError, show
from planner.headers import ModelFilesError
from planner.model_profile import ModelProfile, read_model_profile
from shard_loader.folder import find_folder
from shard_loader.sources import HubError
from shard_loader.vocabulary import difference

Fetch = Callable[[Callable[[int, int], None], threading.Event], Path]


def find_drafter(config: ClusterConfig) -> tuple[Path, Fetch | None] | None:
    """Its folder on this machine, with headers at least, and what gets the rest; None: the file names none.

    Touches no MLX; may block while headers come from the hub. Raises ConfigError.
    """
    name = config.speculation.drafter
    if name is None:
        return None
    try:
        folder = find_folder(name, config.model_dir_base)
        if folder is not None:
            return folder, None
        from shard_loader.hub import find_model  # huggingface_hub takes a while to import

        place = find_model(name, config.model_dir_base)
    except HubError as error:
        raise _wrong(config, str(error)) from None
    return place.folder, None if place.store is None else partial(_fetch, place.folder)


def read_drafter(config: ClusterConfig, folder: Path, model_dir: Path) -> ModelProfile:
    """Its profile. Raises ConfigError where it cannot guess tokens of the model in `model_dir`."""
    name = config.speculation.drafter
    assert name is not None
    try:
        profile = read_model_profile(folder, name)
        different = difference(model_dir, folder)
    except (ModelFilesError, HubError) as error:
        raise _wrong(config, str(error)) from None
    if different:
        raise _wrong(
            config,
            f"its vocabulary is not that of {config.model} ({different}); choose a model of the same "
            'family, or set speculation.method to "ngram"',
        )
    return profile


def _wrong(config: ClusterConfig, why: str) -> ConfigError:
    return ConfigError(
        f"{config.path}: speculation.draft_model = {show(config.speculation.draft_model)}: {why}"
    )


def _fetch(folder: Path, on_progress: Callable[[int, int], None], stopping: threading.Event) -> Path:
    """Get what the whole model needs from the hub. Compute thread: it builds the model. Raises HubError."""
    from shard_loader.fetch import fetch_tensors
    from shard_loader.hub_source import HubSource
    from shard_loader.prepare import ask_again
    from shard_loader.store import Store
    from shard_loader.survey import own_tensors

    store = Store.open(folder)
    if store is not None:
        sources = [HubSource()]
        ask_again(store, sources)
        tensors = own_tensors(folder, 0, read_model_profile(folder).num_layers)
        fetch_tensors(store, tensors, sources, on_progress, stopping)
    return folder
