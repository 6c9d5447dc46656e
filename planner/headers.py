"""Names, shapes and places of every tensor of a checkpoint, from safetensors headers alone.

Reads files and returns values; holds no state, so any thread may call it. No weight is read.
Format: https://github.com/huggingface/safetensors#format (u64 little-endian header size, JSON header, data).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


_MISSING = "{} is missing: " + INDEX_NAME + " names it, download the model again"
UNIFORM_GRID = (
    "{} is a Trellis checkpoint of the older kind, with indices into a uniform grid: it is not EXL3 and "
    "cannot be read; take an EXL3 checkpoint, or make one of the original model with macrame quantize "
    "--format exl3"
)


class ModelFilesError(ValueError):
    """A model folder whose files are missing, cut short or malformed; the message names the file."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies. `dtype` is the safetensors name, `start` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str  # relative to the model folder
    start: int
    nbytes: int


def read_headers(model_dir: Path) -> dict[str, TensorHeader]:
    """Every tensor of the checkpoint in `model_dir`, by name, in the order of its files.

    The files are those of `model.safetensors.index.json`; without one `model*.safetensors`, as in mlx-lm.
    Raises ModelFilesError naming the file for a missing, truncated or malformed one.
    """
    checkpoint = read_checkpoint(model_dir)
    for name in checkpoint.missing:
        raise ModelFilesError(_MISSING.format(model_dir / name))
    return checkpoint.headers


@dataclass(frozen=True, slots=True)
class CheckpointHeaders:
    """What the files that are there say. missing: the tensors, by the index's file that is not there."""

    headers: dict[str, TensorHeader]
    missing: dict[str, tuple[str, ...]]


def read_checkpoint(model_dir: Path) -> CheckpointHeaders:
    """As `read_headers`, but a missing file of the index is told, not refused, unless all of them are."""
    if not model_dir.is_dir():
        raise ModelFilesError(
            f"{model_dir} is not a folder: a model is a folder with config.json and safetensors"
        )
    index = _read_index(model_dir)
    if index is None:
        names = sorted(path.name for path in model_dir.glob("model*.safetensors"))
        if not names and (model_dir / "quantization_index.json").exists():
            raise ModelFilesError(UNIFORM_GRID.format(model_dir))
        if not names:
            raise ModelFilesError(
                f"{model_dir} has no model*.safetensors: convert it with mlx_lm.convert, or download it whole"
            )
    else:
        names = sorted(set(index.values()))
    headers: dict[str, TensorHeader] = {}
    missing = [name for name in names if not (model_dir / name).exists()]
    if len(missing) == len(names):
        raise ModelFilesError(_MISSING.format(model_dir / names[0]))
    for name in names:
        for header in read_file_headers(model_dir, name) if name not in missing else ():
            other = headers.get(header.name)
            if other is not None:
                raise ModelFilesError(
                    f"{model_dir / name} and {model_dir / other.file} both hold the tensor {header.name}"
                )
            headers[header.name] = header
    for tensor, name in (index or {}).items():
        if name not in missing and (tensor not in headers or headers[tensor].file != name):
            raise ModelFilesError(
                f"{model_dir / INDEX_NAME} says that {tensor} is in {name}, but {name} does not hold it: "
                "download the model again"
            )
    lost = {name: tuple(t for t, file in (index or {}).items() if file == name) for name in missing}
    return CheckpointHeaders(headers, lost)


def missing_files(model_dir: Path) -> list[str]:
    """The files that the index of the checkpoint in `model_dir` names and that are not there.

    Raises ModelFilesError for a malformed index.
    """
    names = sorted(set((_read_index(model_dir) or {}).values()))
    return [name for name in names if not (model_dir / name).exists()]


def read_file_headers(model_dir: Path, name: str) -> list[TensorHeader]:
    """The tensors of the one safetensors file `name` in `model_dir`, in the order of its header.

    Raises ModelFilesError naming the file.
    """
    path = model_dir / name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelFilesError(
                    f"{path} is truncated: {size} bytes are no safetensors file, download it again"
                )
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise ModelFilesError(
                    f"{path} is no safetensors file: its header would have {header_bytes} bytes"
                )
            raw = file.read(header_bytes)
    except FileNotFoundError:
        raise ModelFilesError(_MISSING.format(path)) from None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) < header_bytes:
        raise ModelFilesError(
            f"{path} is truncated: its header ends at byte {8 + header_bytes}, the file has {size}, "
            "download it again"
        )
    return _parse_header(path, name, raw, data_start=8 + header_bytes, file_bytes=size)


def read_config(model_dir: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelFilesError naming it when it is missing or not a JSON object."""
    path = model_dir / CONFIG_NAME
    config = read_json(path, missing=f"{path} is missing: a model folder needs one")
    if not isinstance(config, dict):
        raise ModelFilesError(f"{path} is not a JSON object")
    return config


def _read_index(model_dir: Path) -> dict[str, str] | None:
    """Tensor name to file name, or None where there is no index."""
    path = model_dir / INDEX_NAME
    if not path.exists():
        return None
    index = read_json(path, missing=f"{path} is missing")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{path} has no weight_map: download the model again")
    places: dict[str, str] = {}  # file: a tensor in it
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ModelFilesError(f"{path} places {tensor} in {name!r}, which is no file of the model folder")
        places.setdefault(name, tensor)
    for name, tensor in places.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelFilesError(f"{path} places {tensor} in {name!r}, which is no file of the model folder")
    return weight_map


def read_json(path: Path, missing: str) -> Any:
    """The content of a JSON file. Raises ModelFilesError, with the sentence `missing` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(missing) from None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} is not valid JSON: {error}") from None


def _parse_header(path: Path, name: str, raw: bytes, data_start: int, file_bytes: int) -> list[TensorHeader]:
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelFilesError(f"{path} is no safetensors file: its header is not JSON") from None
    if not isinstance(table, dict):
        raise ModelFilesError(f"{path} is no safetensors file: its header is not a JSON object")
    headers = []
    for tensor, entry in table.items():
        if tensor == "__metadata__":
            continue
        dtype, shape, begin, end = _checked_entry(path, tensor, entry)
        if data_start + end > file_bytes:
            raise ModelFilesError(
                f"{path} is truncated: {tensor} ends at byte {data_start + end}, the file has {file_bytes}, "
                "download it again"
            )
        headers.append(TensorHeader(tensor, dtype, shape, name, data_start + begin, end - begin))
    return headers


def _checked_entry(path: Path, tensor: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry, checked against each other."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ModelFilesError(f"{path} has a malformed header entry for {tensor}") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelFilesError(f"{path} stores {tensor} as {dtype!r}, which is no known dtype")
    if not isinstance(shape, list) or not all(map(_is_size, (*shape, begin, end))) or begin > end:
        raise ModelFilesError(f"{path} has a malformed header entry for {tensor}")
    if math.prod(shape) * DTYPE_BITS[dtype] != (end - begin) * 8:
        raise ModelFilesError(
            f"{path} gives {tensor} {end - begin} bytes, but {dtype} {shape} needs another number"
        )
    return dtype, tuple(shape), begin, end


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0
