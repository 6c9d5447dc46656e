"""Tables of stages as bands: no node holds more than its width of layers, so most of a table is empty. Pure.

Shapes: B boundaries, W the most of them that a stage spans.
"""

from __future__ import annotations

import numpy as np

from planner.tables import Floats


def width_of(table: Floats) -> int:
    """The most boundaries that a stage of a (B, B) table spans, at least 1."""
    starts, stops = np.nonzero(np.isfinite(table))
    return int((stops - starts).max(initial=1))


def band_by_start(table: Floats, width: int) -> Floats:
    """(B, W): [start, w] is the stage [start, start + 1 + w)."""
    band = np.full((len(table), width), np.inf)
    for w in range(width):
        own = np.diagonal(table, w + 1)
        band[: len(own), w] = own
    return band


def band_by_stop(table: Floats, width: int) -> Floats:
    """(B, W): [stop, w] is the stage [stop - 1 - w, stop)."""
    band = np.full((len(table), width), np.inf)
    for w in range(width):
        band[w + 1 :, w] = np.diagonal(table, w + 1)
    return band
