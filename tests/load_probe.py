"""What loading a stage reads, holds and gives back, seen from outside the loader: a process of its own.

`python -m tests.load_probe FOLDER START STOP` prints one JSON object. Linux only: /proc/self/io counts the
bytes that the process asked the kernel to read, from the page cache or from the disk.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FORMS = ("plain", "8 bit", "stacked", "single experts")
NUM_LAYERS = 7
CLOSE_S = 5.0


def write_form(form: str, folder: Path) -> Path:
    """A checkpoint of some 100 MB in several files."""
    overrides: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048}
    from tests.tiny_models import write_checkpoint

    options: dict[str, Any] = {"overrides": overrides, "max_shard_bytes": 30_000_000}
    arch = "llama"
    if form == "8 bit":
        options["quantize"] = {"bits": 8, "group_size": 64}
        overrides |= {"hidden_size": 1024, "intermediate_size": 4096}
    elif form in ("stacked", "single experts"):
        arch = "qwen3_moe"
        overrides |= {"moe_intermediate_size": 512}
        options["unstack_experts"] = form == "single experts"
    return write_checkpoint(arch, folder, num_layers=NUM_LAYERS, **options)


def probe(folder: Path, start: int, stop: int) -> dict[str, Any]:
    """Bytes: own weights; read, of which headers; the peak and what is kept, resident and in MLX; what MLX
    has cached; what dropping the shard frees, and what MLX has then left. `open`: files still open.
    """
    command = [sys.executable, "-m", "tests.load_probe", str(folder), str(start), str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _measure(folder: Path, start: int, stop: int) -> dict[str, Any]:
    import mlx.core as mx

    from shard_loader.lean_import import import_lean

    import_lean()  # as a node does
    from shard_loader.trim import trim_memory
    from shard_loader.weights import load_shard
    from tests.tiny_models import write_checkpoint

    with tempfile.TemporaryDirectory() as small:  # imports and constants are there, and are not counted
        load_shard(write_checkpoint("llama", Path(small) / "m", num_layers=1), 0, 1)
    trim_memory()
    mx.reset_peak_memory()
    active, base, read = mx.get_active_memory(), _resident("VmRSS"), _read_bytes()
    shard = load_shard(folder, start, stop)
    trim_memory()  # as a node does
    found: dict[str, Any] = {
        "own": shard.footprint.total_bytes,
        "read": _read_bytes() - read,
        "peak": _resident("VmHWM") - base,
        "kept": (after := _resident("VmRSS")) - base,
        "mlx_peak": mx.get_peak_memory() - active,
        "mlx_kept": mx.get_active_memory() - active,
        "cached": mx.get_cache_memory(),
        "open": _left_open(),
    }
    del shard
    gc.collect()
    trim_memory()
    return found | {
        "headers": sum(map(_header_bytes, folder.glob("*.safetensors"))),
        "freed": after - _resident("VmRSS"),
        "mlx_left": mx.get_active_memory() - active,
    }


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _left_open() -> list[str]:
    """Weight files that stay open: MLX's own thread lets go of one a moment after its last array is there."""
    began, pause = time.monotonic(), threading.Event()
    while found := [path for path in _open_files() if path.endswith(".safetensors")]:
        if time.monotonic() - began > CLOSE_S:
            break
        pause.wait(0.01)
    return found


def _open_files() -> list[str]:
    entries = Path("/proc/self/fd").iterdir()
    return [os.readlink(entry) for entry in entries if entry.exists()]


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
