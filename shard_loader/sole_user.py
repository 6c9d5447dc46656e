"""Whether this process is the only one of ours that computes on its NVIDIA GPU.

Each that does holds a shared lock on a file of the GPU's name; who could have it alone is alone. It is let go
when the process ends, however that happens.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import logging
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

logger = logging.getLogger(__name__)

UUID_BYTES = 16


class SoleUser:
    """Of the device of this name, from now on. Any thread."""

    def __init__(self, name: str, directory: Path | None = None) -> None:
        path = (directory or Path(tempfile.gettempdir())) / f"macrame-{name}.lock"
        self._file: int | None = None
        with ExitStack() as failed:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                failed.callback(os.close, self._file)
                fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                failed.pop_all()
            except OSError as error:  # somebody asks just now, or it is another user's
                logger.info("%s cannot be locked: %s", path, error)
                self._file = None

    def is_alone(self) -> bool:
        """Nobody else uses it at this moment, as far as can be known."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            is_alone = False
        else:
            is_alone = True
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return is_alone

    def close(self) -> None:
        """This one uses it no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


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
