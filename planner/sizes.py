"""Bytes as words. Pure."""

from __future__ import annotations

import math

from planner.node_profile import GB


def gb(nbytes: float) -> str:
    """Bytes as GB, or as MB below 0.1 GB, with three digits or more."""
    value = nbytes / GB
    if value >= 0.1:
        return f"{value:.1f} GB" if value >= 10 else f"{value:.2f} GB"
    return f"{value * 1e3:.1f} MB"


def lacking(nbytes: int, *, is_least: bool = True) -> str:
    """So much is missing, to the byte where it is less than GB and MB show; is_least: no more than that."""
    at_most = "" if is_least else "at most "
    if nbytes == 1:
        return f"{at_most}1 byte is missing"
    return f"{at_most}{gb(nbytes) if nbytes >= GB // 10_000 else f'{nbytes} bytes'} are missing"


def at_least(nbytes: int) -> str:
    """As `gb`, rounded up: what is promised to be enough is."""
    step = GB // 10 if nbytes >= 10 * GB else GB // 100 if nbytes >= GB // 10 else GB // 10_000
    return gb(math.ceil(nbytes / step) * step)


_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def size(num_bytes: int) -> str:
    """Two or three digits in decimal units, from bytes on: 1 GB is 10^9 bytes."""
    for unit, factor in _UNITS:
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes} B"


def done_of(done_bytes: int, total_bytes: int) -> str:
    """How far something is, in the unit of its total, as "1.20 of 4.51 MB"."""
    for unit, factor in _UNITS:
        if total_bytes >= factor:
            return f"{done_bytes / factor:.2f} of {total_bytes / factor:.2f} {unit}"
    return f"{done_bytes} of {total_bytes} B"
