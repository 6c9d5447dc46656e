"""From the config's `model` to a folder on this machine, where it names one. Any thread.

Apart from shard_loader/hub.py because huggingface_hub, which a folder does not need, takes a while to import.
"""

from __future__ import annotations

import re
from pathlib import Path

from shard_loader.sources import HubError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_folder(model: str, base: Path) -> Path | None:
    """The folder that `model` names; None where it may be a hub id. Raises HubError where it is neither."""
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
    return None


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise HubError(f"{folder} has no config.json: a model folder holds config.json and safetensors")
    return folder.resolve()
