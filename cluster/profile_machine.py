"""Measures what this machine does in a ms. For the thread that owns MLX, on MLX's default device."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from cluster.profile_disk import DiskRate, disk_rate
from cluster.profile_fit import TimedProduct, fit_speeds
from cluster.profile_launches import NUM_WAKES, copy_case, layer_ms, stage_ms, step_cases, wake_case
from cluster.profile_products import (
    MAIN_FORMATS,
    OTHER_FORMATS,
    ROWS,
    Product,
    device_clocks,
    is_gpu,
    make_pool,
    sized_product,
)
from cluster.profile_timing import Effort, Estimate, measure
from planner.speeds import Speeds

MEMORY_SHARE = 0.25  # of what is available may hold the weights of all formats
# Of the time: the main formats, and the others, that are not begun by then are left out.
MAIN_SHARE, OTHER_SHARE = 0.8, 0.4
WAKE_S, WAKE_ROUNDS = 0.3, 50
_LACKS = (ValueError, RuntimeError, NotImplementedError)  # what MLX raises for what it has not
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was timed, and the speeds that follow."""

    device: str  # MLX's default: "gpu" or "cpu"
    products: tuple[TimedProduct, ...]
    copy_bytes_ms: float  # read and written, together
    copy_spread: float
    layer_ms: float
    stage_ms: float
    disk: DiskRate | None
    skipped: tuple[str, ...]  # a sentence for each thing that could not be measured
    num_rounds: int

    @property
    def speeds(self) -> Speeds:
        """Raises ValueError where no format could be timed."""
        return fit_speeds(self.products, self.layer_ms, self.stage_ms)


def measure_machine(effort: Effort, *, available_bytes: int, disk_folder: Path, say: Say) -> Measured:
    """Takes about effort.budget_s, the disk and finding the sizes included.

    Raises ValueError where no format could be timed.
    """
    started = time.perf_counter()
    names = (*MAIN_FORMATS, *OTHER_FORMATS) if effort.has_all_formats else MAIN_FORMATS
    pool_bytes = min(effort.pool_bytes, int(MEMORY_SHARE * available_bytes / len(names)))
    say("reading from the disk")
    disk = disk_rate(disk_folder, effort.disk_bytes)
    skipped = [] if isinstance(disk, DiskRate) else [f"disk: {disk}"]
    say(f"finding sizes for {len(names)} formats of weights")
    products, without = _products(names, effort, pool_bytes, started)
    cases = {product.name: product.case() for product in products}
    copied_bytes = max(1 << 20, min(64 << 20, pool_bytes) // 8 * 8)
    cases["copy"] = copy_case(copied_bytes)
    with tempfile.TemporaryDirectory() as folder:
        cases |= step_cases(Path(folder))
    left = replace(effort, budget_s=effort.budget_s - (time.perf_counter() - started))
    found = measure(cases, left, lambda done: say(f"round {done}"), device_clocks())
    steps = {name: estimate.ms for name, estimate in found.items()}
    wake = measure({"wake": wake_case()}, replace(effort, budget_s=WAKE_S, max_rounds=WAKE_ROUNDS))["wake"]
    measured = Measured(
        device="gpu" if is_gpu() else "cpu",
        products=tuple(_timed(product, found[product.name]) for product in products),
        copy_bytes_ms=2 * copied_bytes / found["copy"].ms,
        copy_spread=found["copy"].spread,
        layer_ms=layer_ms(steps),
        stage_ms=stage_ms(steps) + wake.ms / NUM_WAKES,
        disk=disk if isinstance(disk, DiskRate) else None,
        skipped=(*skipped, *without),
        num_rounds=found["copy"].num_rounds,
    )
    mx.clear_cache()
    return measured


def _products(
    names: Sequence[str], effort: Effort, pool_bytes: int, started: float
) -> tuple[list[Product], list[str]]:
    """Those that MLX has here, and a sentence for each that it lacks, or that there is no time for.

    A GPU for which MLX compiles its kernels at first use takes seconds for a format; it keeps them, so the
    next profile comes further.
    """
    products: list[Product] = []
    without = []
    for name in names:
        share = MAIN_SHARE if name in MAIN_FORMATS else OTHER_SHARE
        if products and time.perf_counter() - started > share * effort.budget_s:
            without.append(f"{name}: no time was left for it; a second profile may come further")
            continue
        target_ms = effort.target_ms
        try:
            pool = make_pool(name, target_ms, pool_bytes)
        except _LACKS as error:
            without.append(f"{name}: MLX has no product of this format here ({_first_line(error)})")
            continue
        for rows in ROWS:
            try:
                products.append(sized_product(pool, rows, target_ms))
            except _LACKS as error:
                without.append(f"{name}: MLX has no product of {rows} rows here ({_first_line(error)})")
    return products, without


def _timed(product: Product, estimate: Estimate) -> TimedProduct:
    return TimedProduct(
        format=product.pool[0].format,
        rows=product.rows,
        num_weights=product.num_weights,
        num_bytes=product.num_bytes,
        ms=estimate.ms,
        spread=estimate.spread,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
