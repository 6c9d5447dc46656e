"""What `macrame profile` measured, kept in the user's cache folder until something that matters changes.

One small file for each machine, memory size and MLX version. Reads and writes files; any thread may call it.
Nothing here measures: without a file the chip table speaks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import macos
from cluster.measured_speeds import MeasuredSpeeds
from cluster.versions import mlx_version
from shard_loader.cache_home import user_cache_dir
from shard_loader.whole_file import write_whole

logger = logging.getLogger(__name__)

PROFILE_VERSION = 2  # of how it is measured: a higher one makes older files void
MAX_FILE_BYTES = 1 << 20
MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True, slots=True)
class Machine:
    """What measured speeds belong to; where any of it differs, they are not those of this machine."""

    host_id: str
    chip: str
    gpu_cores: int
    memory_bytes: int
    mlx_version: str
    profile_version: int = PROFILE_VERSION

    @property
    def path(self) -> Path:
        """Where its speeds are kept."""
        text = json.dumps(asdict(self), sort_keys=True)
        return user_cache_dir() / "profile" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def machine_of(chip: str | None, gpu_cores: int | None, memory_bytes: int) -> Machine:
    """This machine, of whose chip and memory the probe knows."""
    return Machine(host_id(), chip or "", gpu_cores or 0, memory_bytes, mlx_version())


def host_id() -> str:
    """Tells machines apart that share a home folder; 16 hex digits that name nothing."""
    try:
        text = (macos.platform_uuid() if sys.platform == "darwin" else MACHINE_ID.read_text().strip()) or ""
    except OSError:
        text = ""
    return hashlib.sha256(f"macrame {text or socket.gethostname()}".encode()).hexdigest()[:16]


def read_speeds(machine: Machine) -> MeasuredSpeeds | None:
    """None where nothing was measured; a file that cannot be read is no reason to stop, and is said so."""
    path = machine.path
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_FILE_BYTES))
        if content["machine"] != asdict(machine):
            raise ValueError("it is of another machine")
        return MeasuredSpeeds.from_dict(content["speeds"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning(
            "the measured speeds in %s cannot be used (%s): run macrame profile again", path, error
        )
        return None


def write_speeds(machine: Machine, found: MeasuredSpeeds, details: Mapping[str, Any]) -> Path:
    """Replace the machine's file as a whole; `details` are for people. Raises OSError."""
    path = machine.path
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": asdict(machine), "speeds": found.as_dict(), "details": dict(details)}
    write_whole(path, json.dumps(content, indent=1).encode(), 0o600)
    return path
