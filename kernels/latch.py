"""A kernel that waits, at the head of a step, for numbers that the host writes later. CUDA only.

Metal has nothing of the kind that could be tried here: what a kernel sees there of what the processor writes
while it runs is not promised to every chip. Belongs to the thread that owns MLX.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

HEADER = Path(__file__).resolve().parent / "cuda" / "latch.h"
THREADS = 256
FLAG_SHAPE = (2,)  # uint32: what the host says, and what the kernel saw of it
OPEN, ABANDONED = 1, 2


def waiting(flag: mx.array, arrays: Sequence[mx.array], bound_s: float) -> list[mx.array]:
    """Arrays like these, lazy; evaluated they have the numbers that are there once `flag[0]` is not 0.

    After `bound_s` they have what is there then. What the kernel saw it writes to `flag[1]`. `flag` and
    `arrays` are evaluated, in memory that the host and the device both see, and have dimensions.
    """
    kernel = _kernel(tuple(array.nbytes for array in arrays), round(bound_s * 1e9))
    return list(
        kernel(
            inputs=[flag, *arrays],
            template=[],
            grid=(THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[array.shape for array in arrays],
            output_dtypes=[array.dtype for array in arrays],
        )
    )


@functools.cache
def _kernel(sizes: tuple[int, ...], bound_ns: int) -> Any:
    """One object for each list of sizes: MLX keeps compiled CUDA code by its name, which so says all."""
    header = HEADER.read_text(encoding="utf-8")
    copies = "".join(f"  latch_copy(in{i}, out{i}, {size});\n" for i, size in enumerate(sizes))
    body = (
        f"  __shared__ unsigned seen;\n"
        f"  if (threadIdx.x == 0) seen = latch_wait((const volatile unsigned*)flag, {bound_ns}ull);\n"
        f"  __syncthreads();\n{copies}"
        f"  if (threadIdx.x == 0) ((volatile unsigned*)flag)[1] = seen;\n"
    )
    made_of = hashlib.sha256((header + body).encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"latch_{made_of}",
        input_names=["flag", *(f"in{i}" for i in range(len(sizes)))],
        output_names=[f"out{i}" for i in range(len(sizes))],
        source=body,
        header=header,
    )
