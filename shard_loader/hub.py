"""From the config's `model` to a folder on this machine: one that is here, cached, or downloaded.

May block for as long as a download takes; touches no MLX, so any thread may call it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class HubError(ValueError):
    """A model that is neither here nor to be had; one sentence that says what to do."""


def resolve_model(
    model: str, base: Path, *, cache_dir: Path | None = None, may_download: bool = True
) -> Path:
    """The folder of `model`: a path (relative to `base`, then to the working folder) or a hub id.

    A hub id is looked up in the local cache first (`cache_dir`, by default Hugging Face's) and downloaded
    whole where it is not complete there; without `may_download` that is an error. Raises HubError.
    """
    if not model.strip():
        raise HubError("the model is empty: name a folder or a hub id such as mlx-community/Qwen3-1.7B-8bit")
    path = Path(model).expanduser()
    places = [path] if path.is_absolute() else [base / path, Path.cwd() / path]
    for place in places:
        if place.is_dir():
            return _checked_folder(place)
    if path.is_absolute() or not _HUB_ID.fullmatch(model):
        looked = " or ".join(dict.fromkeys(str(place) for place in places))
        raise HubError(f"there is no model folder {looked}, and {model!r} is no hub id")
    cached = _from_cache(model, cache_dir)
    if cached is None and not may_download:
        raise HubError(
            f"{model} is neither a folder here nor complete in the local cache: "
            f"download it with `hf download {model}`"
        )
    return cached or _download(model, cache_dir)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise HubError(f"{folder} has no config.json: a model folder holds config.json and safetensors")
    return folder.resolve()


def _from_cache(model: str, cache_dir: Path | None) -> Path | None:
    """The cached snapshot if it is complete, else None."""
    try:
        folder = Path(
            snapshot_download(model, cache_dir=cache_dir, local_files_only=True, allow_patterns=PATTERNS)
        )
    except LocalEntryNotFoundError:
        return None
    return folder if _first_missing(folder) is None else None


def _first_missing(folder: Path) -> str | None:
    """The first file that the model in `folder` needs and does not have."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None if any(folder.glob("model*.safetensors")) else "model.safetensors"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"a readable {index.name}"
    return next((file for file in files if not (folder / file).is_file()), None)


def _download(model: str, cache_dir: Path | None) -> Path:
    try:
        folder = Path(snapshot_download(model, cache_dir=cache_dir, allow_patterns=PATTERNS))
    except GatedRepoError as error:
        raise HubError(
            f"{model} asks you to accept its licence: do so on https://huggingface.co/{model}, "
            "then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{model} is neither a folder here nor a model on the Hugging Face hub") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(
            f"{model} is not in the local cache and the Hugging Face hub cannot be reached: "
            f"fetch it with `hf download {model}` or name a folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise HubError(f"{model} cannot be downloaded: {first_line}") from error
    missing = _first_missing(folder)
    if missing is not None:  # offline, the hub's client settles for what is there
        raise HubError(
            f"{model} lacks {missing}, here and after asking the Hugging Face hub: "
            f"fetch it with `hf download {model}` or name a folder"
        )
    return folder
