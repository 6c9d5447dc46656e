"""Blocks of experts and EXL3 matrices by their form, and how long a node takes for one of them. Pure.

The times are those of the self-test of kernels (kernels.self_test): of what the node really uses, the kernels
or MLX's operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_ROWS = 1 << 20
MAX_SPAN_MS = 60_000.0  # of one block: beyond it a clock is wrong
BLOCK_MATRICES = (2, 3)  # up and down, with a gate or without


@dataclass(frozen=True, slots=True)
class Form:
    """What the time of a block or matrix hangs on. Raises ValueError for sizes below 1.

    A block of experts has a format for each of its two or three matrices, in the order of their names;
    outputs is the width of an expert. A matrix has one format; num_experts 1 where it is no expert's.
    """

    num_experts: int
    top_k: int
    inputs: int
    outputs: int
    formats: tuple[str, ...]  # as planner.speeds names them

    def __post_init__(self) -> None:
        for key in ("num_experts", "top_k", "inputs", "outputs"):
            if not 1 <= getattr(self, key) < 1 << 31:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1, and less than 2^31")
        if len(self.formats) not in (1, *BLOCK_MATRICES) or list(self.formats) != sorted(self.formats):
            raise ValueError(f"formats = {self.formats} must be one, or two or three in order")


@dataclass(frozen=True, slots=True)
class FormSpan:
    """From first to last rows, both measured. Raises ValueError for rows or times that cannot be."""

    first_rows: int
    last_rows: int
    first_ms: float
    last_ms: float

    def __post_init__(self) -> None:
        if not 1 <= self.first_rows <= self.last_rows <= MAX_ROWS:
            raise ValueError(
                f"rows = {self.first_rows} to {self.last_rows} must be in order, from 1 to {MAX_ROWS}"
            )
        for key in ("first_ms", "last_ms"):
            if not 0 < getattr(self, key) <= MAX_SPAN_MS:
                raise ValueError(f"{key} = {getattr(self, key)} must be above 0, and at most {MAX_SPAN_MS}")

    def ms(self, rows: int) -> float | None:
        """On the line between both ends; None outside."""
        if not self.first_rows <= rows <= self.last_rows:
            return None
        width = self.last_rows - self.first_rows
        share = (rows - self.first_rows) / width if width else 0.0
        return self.first_ms + share * (self.last_ms - self.first_ms)


@dataclass(frozen=True, slots=True)
class FormTimes:
    """How long a node takes for one block or matrix. Raises ValueError for spans that overlap."""

    form: Form
    spans: tuple[FormSpan, ...]  # by rows; between them nothing is known

    def __post_init__(self) -> None:
        for before, after in zip(self.spans, self.spans[1:], strict=False):
            if after.first_rows <= before.last_rows:
                raise ValueError(
                    f"rows = {before.first_rows} to {before.last_rows} and {after.first_rows} to "
                    f"{after.last_rows} must be in order, and apart"
                )

    def ms(self, rows: int) -> float | None:
        """Of a pass with so many rows; None: it was not measured."""
        return next((ms for span in self.spans if (ms := span.ms(rows)) is not None), None)

    def scaled(self, factor: float) -> FormTimes:
        """On a node that takes `factor` as long."""
        spans = (replace(s, first_ms=s.first_ms * factor, last_ms=s.last_ms * factor) for s in self.spans)
        return replace(self, spans=tuple(spans))


def form_ms(times: Iterable[FormTimes], form: Form, rows: int) -> float | None:
    """Where the same form was measured more than once (another activation, another codebook), the longest."""
    found = (one.ms(rows) for one in times if one.form == form)
    return max((ms for ms in found if ms is not None), default=None)


def known_forms(times: Iterable[FormTimes], forms: Iterable[Form]) -> tuple[FormTimes, ...]:
    """Those of `times` that are of one of these forms."""
    wanted = set(forms)
    return tuple(one for one in times if one.form in wanted)
