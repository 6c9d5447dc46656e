"""One thing that kernels are tried on: seeded arrays, what runs the kernels, what MLX's ops make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

Outputs = mx.array | Sequence[mx.array]


@dataclass(frozen=True, slots=True)
class Case:
    """`run` takes the arrays that `inputs` makes and returns what its kernels return; it evaluates nothing,
    so that a GPU never waits. `reference` takes the same and computes in float32 with MLX's ops."""

    name: str  # kernel/format-and-sizes: what a table of results says
    inputs: Callable[[], Sequence[mx.array]]
    run: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    tolerance: float  # of the largest difference over the largest value of the reference
    is_exact: bool = False  # bit for bit: integers, and codes
    is_golden: bool = False  # its sources are in tests/golden_msl
    is_full: bool = False  # a real model's sizes: for GPUs, too much for the emulator
    is_long: bool = False  # beyond what a push is checked with
    once: tuple[str, ...] = ()  # buffers of weights: hardly more is asked of them than each byte once


def as_list(outputs: Outputs) -> list[mx.array]:
    return [outputs] if isinstance(outputs, mx.array) else list(outputs)


def relative_error(found: mx.array, wanted: mx.array) -> float:
    """The largest difference over the largest value; infinite where anything found is not finite."""
    a, b = found.astype(mx.float32), wanted.astype(mx.float32)
    if a.shape != b.shape:
        raise ValueError(f"the kernel returns {a.shape}, the reference {b.shape}")
    if not mx.isfinite(a).all().item():
        return float("inf")
    largest: list[float] = mx.stack([mx.abs(a - b).max(), mx.abs(b).max()]).tolist()  # type: ignore[assignment]
    return largest[0] / max(largest[1], 1e-30)


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
