"""What tells two checkpoints apart: their tensors' names and shapes, and samples of their bytes. Pure but for
reading the files it is given.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from planner.headers import TensorHeader, read_config
from planner.missing import known_headers

SAMPLES = 64
SAMPLE_BYTES = 4096


def model_digest(model_dir: Path) -> str:
    """16 hex digits that tell two checkpoints apart: config.json, and all names, dtypes and shapes.

    Equal for equal models on different machines, however their files are cut. Reads no weights.
    Raises ModelFilesError as `planner.missing.known_headers` and `read_config` do.
    """
    return digest_of(read_config(model_dir), known_headers(model_dir))


def digest_of(config: dict[str, Any], headers: dict[str, TensorHeader]) -> str:
    """`model_digest` of values that were read before."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(headers):
        header = headers[name]
        digest.update(f"\n{name} {header.dtype} {list(header.shape)}".encode())
    return digest.hexdigest()[:16]


def sample_files(model_dir: Path) -> dict[str, str]:
    """`sample_file` of each weight file here, by name."""
    return {path.name: sample_file(path) for path in sorted(model_dir.glob("*.safetensors"))}


def sample_file(path: Path) -> str:
    """A digest of a file's size and of SAMPLES pieces of its bytes.

    Tells another revision or a fine-tune from the same model without reading it all; a flipped byte between
    the pieces goes unseen.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(size * i // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
