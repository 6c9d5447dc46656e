"""From what was timed to the speeds that the planner reckons with. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.speeds import EXL3, FormatRate, Speeds

# A product of one row this close to the fastest rate of bytes is bound by memory, not by arithmetic.
NEAR = 1.15
FALLBACKS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class TimedProduct:
    """A product of `rows` rows with num_weights weights of one format, which take num_bytes."""

    format: str
    rows: int
    num_weights: int
    num_bytes: int
    ms: float
    spread: float = 0.0

    @property
    def bytes_ms(self) -> float:
        return self.num_bytes / self.ms

    @property
    def weights_ms(self) -> float:
        """Weights that one row multiplies with in a ms."""
        return self.rows * self.num_weights / self.ms

    @property
    def flops_ms(self) -> float:
        """A multiplication and an addition for each weight and row."""
        return 2 * self.weights_ms


def fit_speeds(products: Sequence[TimedProduct], layer_ms: float, stage_ms: float) -> Speeds:
    """Measured speeds.

    `read_bytes_ms` is the fastest rate at which weights of any format are read for one row. A format whose
    one row takes longer than its bytes at that rate is bound by arithmetic, and `weights_ms` makes that row
    exact; EXL3 is decoded once for all rows, and there `decoded_ms` does. Of a format that keeps up, and of
    EXL3, `weights_ms` is what a row of several costs: never less than one row reaches. Raises ValueError
    where nothing was measured.
    """
    by_format: dict[str, dict[int, TimedProduct]] = {}
    for product in products:
        by_format.setdefault(product.format, {})[product.rows] = product
    whole = {name: found for name, found in by_format.items() if 1 in found and len(found) > 1}
    if not whole:
        raise ValueError("formats = 0 must be at least 1: no product of weights could be timed")
    read_bytes_ms = max(found[1].bytes_ms for found in whole.values())
    rates = tuple(
        _exl3_rate(name, found, read_bytes_ms)
        if name.startswith(EXL3)
        else FormatRate(name, _weights_ms(found, read_bytes_ms), found[max(found)].flops_ms)
        for name, found in whole.items()
    )
    return Speeds(
        read_bytes_ms=read_bytes_ms,
        flops_ms=_fallback({rate.format: rate.flops_ms for rate in rates}),
        layer_ms=layer_ms,
        stage_ms=stage_ms,
        formats=rates,
        source="measured",
    )


def _exl3_rate(name: str, found: Mapping[int, TimedProduct], read_bytes_ms: float) -> FormatRate:
    """Weights are decoded once for all rows: one row tells how fast, a few what each row costs."""
    one, few = found[1], found[sorted(found)[1]]
    is_memory_bound = one.bytes_ms * NEAR >= read_bytes_ms
    weights_ms = max(one.weights_ms, few.weights_ms)
    return FormatRate(
        name, weights_ms, found[max(found)].flops_ms, 0.0 if is_memory_bound else one.weights_ms
    )


def _weights_ms(found: Mapping[int, TimedProduct], read_bytes_ms: float) -> float:
    one, few = found[1], found[sorted(found)[1]]
    is_memory_bound = one.bytes_ms * NEAR >= read_bytes_ms
    return max(one.weights_ms, few.weights_ms) if is_memory_bound else one.weights_ms


def _fallback(flops_ms: Mapping[str, float]) -> float:
    """What attention and formats without a rate of their own get: activations have these dtypes."""
    return next((flops_ms[name] for name in FALLBACKS if name in flops_ms), min(flops_ms.values()))
