"""What a node does in a ms, and what launching work costs it: by the chip table, or measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.chips import Chip
from planner.forms import FormTimes

# Decode reaches 55-85 % of the peak bandwidth on Apple chips (docs of mlx-lm, llama.cpp discussion 4167).
DECODE_EFFICIENCY = 0.7
# Large matrix products reach about half of the peak rate, attention and quantised formats included.
PREFILL_EFFICIENCY = 0.5
# Decoding one EXL3 weight takes a GPU's lane about 12 cycles (9-15 by the instructions of the codebooks), and
# `flops_ms` is half of two operations a lane and cycle: so many of those operations are one decoded weight.
DECODE_FLOPS = 12
EXL3 = "exl3/"  # and the bits
# Launching one layer's kernels, and waking a stage up for one microbatch.
LAYER_OVERHEAD_MS = 0.05
STAGE_OVERHEAD_MS = 0.3


@dataclass(frozen=True, slots=True)
class FormatRate:
    """How fast a node multiplies with weights of one format.

    Formats are named "float32", "bfloat16", "float16", "affine4/64" (bits/group size, scales in bfloat16),
    "affine4/64+float16" (in another dtype), "mxfp4", "mxfp8", "nvfp4", "exl3/3" (bits).
    Raises ValueError for a rate that is not above 0.
    """

    format: str
    weights_ms: float  # weights that a product with few rows multiplies in a ms, for each row
    flops_ms: float  # floating-point operations a ms of a product with 512 rows
    decoded_ms: float = 0.0  # EXL3 weights decoded in a ms, once for all rows; 0: faster than they are read

    def __post_init__(self) -> None:
        _check_above_zero(self, ("weights_ms", "flops_ms"))
        if not 0 <= self.decoded_ms < float("inf"):
            raise ValueError(f"decoded_ms = {self.decoded_ms} must be a number of 0 or more")


@dataclass(frozen=True, slots=True)
class Speeds:
    """A node's rates. Raises ValueError for a rate that is not above 0, or a format that is named twice."""

    read_bytes_ms: float  # weights and caches that a decode step reads in a ms
    flops_ms: float  # of large products, for formats that `formats` does not name
    layer_ms: float = LAYER_OVERHEAD_MS  # launching one layer's kernels
    stage_ms: float = STAGE_OVERHEAD_MS  # waking a stage for one microbatch
    formats: tuple[FormatRate, ...] = ()
    source: Literal["table", "measured"] = "table"
    forms: tuple[FormTimes, ...] = ()  # of whole blocks and matrices, in the place of their formats' rates

    def __post_init__(self) -> None:
        _check_above_zero(self, ("read_bytes_ms", "flops_ms"))
        for key in ("layer_ms", "stage_ms"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"{key} = {getattr(self, key)} must be a number of 0 or more")
        names = [rate.format for rate in self.formats]
        for name in names:
            if name.startswith(EXL3) and not name.removeprefix(EXL3).isdecimal():
                raise ValueError(f"format = {name!r} must be {EXL3} and a number of bits")
        if len(set(names)) != len(names):
            raise ValueError(f"formats = {', '.join(names)} names one twice")

    def of(self, name: str) -> FormatRate | None:
        """The rates of a format; None where only bytes and `flops_ms` are known to bind it."""
        return next((rate for rate in self.formats if rate.format == name), None)

    def weight_bytes_ms(self, name: str) -> float:
        """Bytes of weights of a format that a pass gets through in a ms, once for all its rows.

        Decoding bounds EXL3 weights as well as reading. It takes about as long for any number of bits, so
        that of those that were measured the nearest counts.
        """
        bits = name.removeprefix(EXL3)
        if bits == name:
            return self.read_bytes_ms
        measured = [rate for rate in self.formats if rate.format.startswith(EXL3)]
        if measured:
            nearest = min(measured, key=lambda r: abs(int(r.format.removeprefix(EXL3)) - int(bits)))
            decoded_ms = nearest.decoded_ms or float("inf")
        else:
            decoded_ms = self.flops_ms / DECODE_FLOPS
        return min(self.read_bytes_ms, decoded_ms * int(bits) / 8)


def table_speeds(chip: Chip) -> Speeds:
    """What the chip's peak figures let expect."""
    return Speeds(
        read_bytes_ms=chip.bandwidth_gb_s * 1e6 * DECODE_EFFICIENCY,
        flops_ms=chip.tflops * 1e9 * PREFILL_EFFICIENCY,
    )


def _check_above_zero(value: Speeds | FormatRate, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not 0 < getattr(value, key) < float("inf"):
            raise ValueError(f"{key} = {getattr(value, key)} must be a number above 0")
