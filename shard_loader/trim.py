"""Gives free memory back to the system. Compute thread only."""

from __future__ import annotations

import ctypes
import sys

import mlx.core as mx


def clear_cache() -> None:
    """Give back what MLX keeps of freed buffers; never such as the device still uses.

    A GPU that kept them was slower (docs/benchmarks.md).
    """
    mx.synchronize()
    mx.clear_cache()


def trim_memory() -> None:
    """MLX's cache of freed buffers, and on Linux the pages that the C library keeps of what was freed.

    glibc keeps those of blocks below 32 MB, which most tensors are: malloc_trim(3), mallopt(3).
    """
    clear_cache()
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if release is not None:
            release(0)
