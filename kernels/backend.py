"""What runs the kernels here: Metal, CUDA, the emulator on the CPU, or nothing (then MLX's own ops are used).

MACRAME_KERNELS=off turns them all off; MACRAME_KERNELS=emulate runs them on this CPU, thread by thread, which
is for tests: thousands of times slower than a GPU. Any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import mlx.core as mx

from kernels.wanted import wanted

Backend = Literal["metal", "cuda", "emulated"]


_forced: list[Backend] = []


def current() -> Backend | None:
    """The backend of a kernel called now; None where there is none, or where the user wants none.

    Raises ValueError where MACRAME_KERNELS is none of on, off, emulate."""
    if _forced:
        return _forced[-1]
    asked = wanted()
    if asked == "off":
        return None
    if asked == "emulate":
        return "emulated"
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


@contextlib.contextmanager
def forced(name: Backend) -> Iterator[None]:
    """Inside, this is the backend: to look at sources that are made for it, on any machine."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
