"""The unfinished output of a quantisation: one file for each layer that is done, and how they become a
model.

OUTPUT.partial holds settings.json and a safetensors file for each layer, each written beside its place and
then renamed, so that a killed run leaves whole files alone and goes on behind them. The model is put
together in OUTPUT.partial/model and becomes OUTPUT by one rename, as the last step. One process at a time,
which a lock in the folder holds; main thread only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_USAGE, UserError
from cluster.quantize_card import NAME as CARD
from cluster.quantize_card import is_card
from planner.sizes import size
from shard_loader.whole_file import write_whole

SHARD_BYTES = 2_000_000_000
SETTINGS = "settings.json"
FILE_BYTES = 1 << 14  # of a file besides its tensors: its header, and blocks that are not full
_LOCK = "lock"
_MODEL, _WRITING = "model", "writing.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_OF_WEIGHTS = {"model.safetensors.index.json", "config.json", "quantization_config.json"}

Tensors = dict[str, mx.array]


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """OUTPUT.partial, made where it is missing, for nobody else meanwhile; removed where it stays empty.

    Raises UserError where the output is there, another process writes it, or the folder cannot be made.
    """
    folder = output.with_name(output.name + ".partial")
    _refuse_existing(output)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / _LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_nlink == 0:  # who had it before is leaving
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(
                f"another macrame quantize writes {output}: wait for it, or name another --output", EXIT_ERROR
            ) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be used: {error}", EXIT_USAGE) from None
        try:
            _refuse_existing(output)
            yield folder
        finally:
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
                folder.rmdir()


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output} is there already: remove it, or name another --output", EXIT_USAGE)


class Parts:
    """The layers that are done. Raises UserError where the folder is of a run with other settings."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self._settings = json.loads(json.dumps(settings))
        self._needed_bytes = 0

    def open(self, needed_bytes: int) -> None:
        """Begins in the claimed folder, or takes up what is there. Raises UserError where it cannot be.

        needed_bytes: of all parts and the result.
        """
        self._needed_bytes = needed_bytes
        file = self.folder / SETTINGS
        try:
            if not file.exists():
                _check_room(self.folder, needed_bytes)
                write_whole(file, json.dumps(self._settings, indent=2).encode())
            elif json.loads(file.read_text(encoding="utf-8")) != self._settings:
                raise UserError(
                    f"{self.folder} holds a stopped run with other settings: repeat that one's command, or "
                    "remove the folder",
                    EXIT_USAGE,
                )
            else:
                shutil.rmtree(self.folder / _MODEL, ignore_errors=True)
                (self.folder / _WRITING).unlink(missing_ok=True)
                self._check_rest()
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                self._check_rest()
            raise UserError(f"{self.folder} cannot be used: {error}", EXIT_USAGE) from None

    def find(self, name: str) -> Tensors | None:
        """What an earlier run wrote for a layer; None also for a file that a power cut left damaged."""
        file = self._file(name)
        if not file.exists():
            return None
        try:
            found = dict(mx.load(str(file)))  # type: ignore[arg-type]
            mx.eval(found)
        except RuntimeError:
            return None
        return found

    def write(self, name: str, tensors: Tensors) -> None:
        """Keeps a layer. Raises UserError where the disk is full; then the layers before it are whole."""
        file = self._file(name)
        beside = self.folder / _WRITING
        try:
            mx.save_safetensors(str(beside), tensors)
            os.replace(beside, file)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):  # of a disk that is gone, or such: `error` is what to tell
                beside.unlink(missing_ok=True)
                self._check_rest(sum(array.nbytes for array in tensors.values()))
            raise _unwritable(file, error) from None

    def _check_rest(self, next_bytes: int = 0) -> None:
        """Raises UserError where there is no room for what is not yet written; next_bytes: at once."""
        held = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        left = max(self._needed_bytes - held, next_bytes + FILE_BYTES)
        lacking = left - shutil.disk_usage(self.folder).free
        if lacking > 0:
            raise UserError(
                f"the disk of {self.folder} lacks {size(lacking)} of the {size(left)} that are still to be "
                "written: make room and repeat the command, it goes on where it stopped",
                EXIT_DOES_NOT_FIT,
            )

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def assemble(
        self, names: Iterable[str], kept: Iterable[tuple[str, mx.array]], config: Mapping[str, Any],
        source: Path, card: str,
    ) -> int:  # fmt: skip
        """Writes the model and removes the parts; returns the bytes of its tensors.

        Raises UserError where it cannot be written; then the parts stay, and nothing of the model.
        """
        model = self.folder / _MODEL
        kept = list(kept)
        shutil.rmtree(model, ignore_errors=True)
        try:
            model.mkdir()
            total = _write_shards(model, self._all(names, kept))
            copy_others(source, model, card)
            quantization = config["quantization_config"]
            for name, value in {"quantization_config.json": quantization, "config.json": config}.items():
                (model / name).write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
            os.replace(model, self.output)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(model, ignore_errors=True)
            with contextlib.suppress(OSError):
                parts_bytes = sum(self._file(name).stat().st_size for name in names)
                kept_bytes = sum(array.nbytes for _, array in kept)
                self._check_rest(parts_bytes + kept_bytes + others_bytes(source, card))
            raise _unwritable(self.output, error) from None
        shutil.rmtree(self.folder, ignore_errors=True)
        return total

    def _all(
        self, names: Iterable[str], kept: Iterable[tuple[str, mx.array]]
    ) -> Iterable[tuple[str, mx.array]]:
        yield from kept
        for name in names:
            yield from dict(mx.load(str(self._file(name)))).items()  # type: ignore[arg-type]


def copy_others(source: Path, folder: Path, card: str) -> None:
    """The source's files but for its weights and what describes them: tokenizer, templates, licence.

    card: the new README.md.
    """
    for file in _others(source):
        copied = folder / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
    (folder / CARD).write_text(card, encoding="utf-8")


def others_bytes(source: Path, card: str) -> int:
    """What `copy_others` writes."""
    return sum(file.stat().st_size for file in _others(source)) + len(card.encode())


def _others(source: Path) -> list[Path]:
    return [
        file
        for file in (*sorted(source.iterdir()), *sorted(source.glob("*_*/config.json")))  # of poolings, too
        if file.is_file()
        and not file.name.endswith(_WEIGHTS)
        and file.relative_to(source).as_posix() not in _OF_WEIGHTS
        and not is_card(file)
    ]


def _unwritable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be written ({error}): repeat the command, it goes on where it stopped")


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


def _check_room(folder: Path, needed_bytes: int) -> None:
    """Raises UserError where the disk of `folder` has too little for the result and its parts."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"the result and its parts take {size(needed_bytes)} and {folder.parent} has {size(free)} free: "
            "make room, or name an --output on another disk",
            EXIT_DOES_NOT_FIT,
        )
