"""Sizes for people. Pure."""

from __future__ import annotations


def size(num_bytes: int) -> str:
    """Two or three digits in decimal units: 1 GB is 10^9 bytes."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes} B"
