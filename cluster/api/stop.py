"""Stop strings over text that arrives in pieces. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopFilter:
    """Passes text on as soon as it cannot be the beginning of a stop string any more.

    After `is_matched` no more text comes. O(length of the longest stop string) per piece.
    """

    __slots__ = ("_held", "_is_included", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._is_included = is_included
        self._held = ""
        self.matched = ""  # the first stop string that came

    @property
    def is_matched(self) -> bool:
        return bool(self.matched)

    def push(self, text: str) -> str:
        """Takes the next piece; returns what may be shown now: everything before the first stop string."""
        if self.is_matched:
            return ""
        held = self._held + text
        found = [(held.find(stop), stop) for stop in self._stops if stop in held]
        if found:
            start, stop = min(found, key=lambda match: match[0])
            self.matched = stop
            self._held = ""
            return held[: start + len(stop)] if self._is_included else held[:start]
        keep = num_held(held, self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def num_held(text: str, markers: Iterable[str]) -> int:
    """Length of the longest end of `text` that begins some marker without being all of it."""
    return max(
        (
            size
            for marker in markers
            for size in range(1, min(len(marker) - 1, len(text)) + 1)
            if marker.startswith(text[len(text) - size :])
        ),
        default=0,
    )
