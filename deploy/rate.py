"""Tokens per second between two looks at counters. Pure: the caller brings the time."""

from __future__ import annotations

from collections.abc import Mapping


class Rate:
    """Knows the counters of the look before."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._seen_at_s = 0.0

    def update(self, counters: Mapping[str, float], now_s: float) -> dict[str, float]:
        """Per second, for each counter that was there before and has not begun anew."""
        elapsed_s = now_s - self._seen_at_s
        found = {
            name: (value - self._seen[name]) / elapsed_s
            for name, value in counters.items()
            if name in self._seen and value >= self._seen[name] and elapsed_s > 0
        }
        self._seen, self._seen_at_s = dict(counters), now_s
        return found
