"""The text pass from a Metal body to a CUDA one for mx.fast.cuda_kernel: a simdgroup is a warp, a threadgroup
a block. Values only, any thread.
"""

from __future__ import annotations


def body(source: str) -> str:
    return source


def header(source: str) -> str:
    return source
