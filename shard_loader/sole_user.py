"""Whether this process is the only one of ours that computes on its NVIDIA GPU.

Each that does locks a file of its own, of those with the GPU's name and a number; who can lock all others is
alone. A lock ends with its process, however that ends, and is not let go before: nobody is overlooked.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

UUID_BYTES = 16
MAX_USERS = 16


class SoleUser:
    """Of the device of this name, from now on. Any thread."""

    def __init__(self, name: str, directory: Path | None = None) -> None:
        folder = directory or Path(tempfile.gettempdir())
        self._paths = [folder / f"macrame-{name}-{number}.lock" for number in range(MAX_USERS)]
        self._own: tuple[Path, int] | None = None
        for path in self._paths:
            if (file := _locked(path)) is not None:
                self._own = path, file
                return
        logger.info("no file like %s can be locked", self._paths[0])

    def is_alone(self) -> bool:
        """Nobody else uses it at this moment, as far as can be known."""
        if self._own is None:
            return False
        for path in self._paths:
            if path == self._own[0] or not path.exists():
                continue
            if (file := _locked(path)) is None:
                return False
            os.close(file)
        return True

    def close(self) -> None:
        """This one uses it no more."""
        if self._own is not None:
            os.close(self._own[1])
            self._own = None


def _locked(path: Path) -> int | None:
    """The open file; None where somebody has locked it, or where it cannot be opened."""
    try:
        file = _opened(path)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _opened(path: Path) -> int:
    """To read: a lock needs no more, and others' files allow no more. One is made where there is none."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


@functools.cache
def gpu_of_this_process() -> SoleUser:
    """Its first NVIDIA GPU, held until the process ends."""
    return SoleUser(_gpu_name())


def _gpu_name() -> str:
    """The UUID, as the driver says it; a name for all where it does not."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "gpu"
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * UUID_BYTES)()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    failure = driver.cuDeviceGetUuid(uuid, device)
    return "gpu" if failure else f"gpu-{bytes(uuid).hex()}"
