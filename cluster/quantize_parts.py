"""The unfinished output of a quantisation: one file for each layer that is done, and how they become a
model.

OUTPUT.partial holds settings.json and a safetensors file for each layer, each written beside its place and
then renamed, so that a killed run leaves whole files alone and goes on behind them. The model is put
together in OUTPUT.partial/model and becomes OUTPUT by one rename, as the last step. One process at a time,
main thread only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, UserError

SHARD_BYTES = 2_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_OF_WEIGHTS = {"model.safetensors.index.json", "config.json", "quantization_config.json"}

Tensors = dict[str, mx.array]


class Parts:
    """The layers that are done. Raises UserError where the folder is of a run with other settings."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self._settings = json.loads(json.dumps(settings))

    def open(self, needed_bytes: int) -> None:
        """Makes the folder, or takes up the one that is there. Raises UserError where it cannot be used."""
        if self.output.exists():
            raise UserError(
                f"{self.output} is there already: remove it, or name another --output", EXIT_USAGE
            )
        file = self.folder / "settings.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                _check_room(self.folder, needed_bytes)
                _replace(file, json.dumps(self._settings, indent=2).encode())
            elif json.loads(file.read_text(encoding="utf-8")) != self._settings:
                raise UserError(
                    f"{self.folder} holds a stopped run with other settings: repeat that one's command, or "
                    "remove the folder",
                    EXIT_USAGE,
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} cannot be used: {error}", EXIT_USAGE) from None

    def find(self, name: str) -> Tensors | None:
        """What an earlier run wrote for a layer."""
        file = self._file(name)
        if not file.exists():
            return None
        return dict(mx.load(str(file)))  # type: ignore[arg-type]

    def write(self, name: str, tensors: Tensors) -> None:
        """Keeps a layer. Raises UserError where the disk is full."""
        file = self._file(name)
        beside = file.with_name("writing.safetensors")
        try:
            mx.save_safetensors(str(beside), tensors)
            os.replace(beside, file)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{file} cannot be written ({error}): make room and repeat the command, it goes on from here"
            ) from None

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def assemble(
        self, names: Iterable[str], kept: Iterable[tuple[str, mx.array]], config: Mapping[str, Any],
        source: Path, extra_json: Mapping[str, Any],
    ) -> int:  # fmt: skip
        """Writes the model and removes the parts; returns the bytes of its tensors."""
        model = self.folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        try:
            model.mkdir()
            total = _write_shards(model, self._all(names, kept))
            copy_others(source, model)
            for name, value in {**extra_json, "config.json": config}.items():
                (model / name).write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
            os.replace(model, self.output)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{self.output} cannot be written ({error}): make room and repeat the command"
            ) from None
        shutil.rmtree(self.folder, ignore_errors=True)
        return total

    def _all(
        self, names: Iterable[str], kept: Iterable[tuple[str, mx.array]]
    ) -> Iterable[tuple[str, mx.array]]:
        yield from kept
        for name in names:
            yield from dict(mx.load(str(self._file(name)))).items()  # type: ignore[arg-type]


def copy_others(source: Path, folder: Path) -> None:
    """The source's files but for its weights and what describes them: tokenizer, templates, licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OF_WEIGHTS:
            shutil.copyfile(file, folder / file.name)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, mx.array]]) -> int:
    """Files of up to SHARD_BYTES and their index; returns the bytes of all tensors."""
    shards: list[list[str]] = []
    group: Tensors = {}
    total = held = 0

    def flush() -> None:
        nonlocal group, held
        if group:
            mx.save_safetensors(
                str(folder / f"part-{len(shards)}.safetensors"), group, metadata={"format": "mlx"}
            )
            shards.append(list(group))
        group, held = {}, 0

    for name, array in tensors:
        if held and held + array.nbytes > SHARD_BYTES:
            flush()
        group[name] = array
        held += array.nbytes
        total += array.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        last = (
            f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        os.replace(folder / f"part-{number}.safetensors", folder / last)
        weight_map |= dict.fromkeys(names, last)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")
    return total


def _replace(file: Path, content: bytes) -> None:
    beside = file.with_name(file.name + ".new")
    beside.write_bytes(content)
    os.replace(beside, file)


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        folder.rmdir()
        raise UserError(
            f"the result and its parts take {needed_bytes / 1e9:.1f} GB and {folder.parent} has "
            f"{free / 1e9:.1f} GB free: make room, or name an --output on another disk",
            EXIT_DOES_NOT_FIT,
        )
