"""Tells a model's reasoning from its answer where both come in one text, as <think>...</think>. Pure."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class ThoughtFilter:
    """Takes an answer piece by piece; yields (text, is_thought).

    Only a tag at the answer's beginning opens: one in the middle is text. Some models' templates open the
    thought themselves, so that their answers only close it: `is_inside` says that this is such a model.
    """

    def __init__(self, *, is_inside: bool = False) -> None:
        self._is_inside = is_inside
        self._has_begun = is_inside
        self._held = ""
        self.has_closed = False
        self.has_opened = False

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """What of the text so far is decided."""
        self._held += text
        self._look_for_begin()
        if not self._has_begun:
            return []
        found: list[tuple[str, bool]] = []
        if not self.has_closed and CLOSE in self._held:
            found += self._close()
        keep = 0 if self.has_closed else _overlap(self._held, CLOSE)
        cut = len(self._held) - keep
        found.append((self._held[:cut], self._is_inside))
        self._held = self._held[cut:]
        return [piece for piece in found if piece[0]]

    def end(self) -> list[tuple[str, bool]]:
        """What was held back in case it became a tag."""
        held, self._held = self._held, ""
        return [(held, self._is_inside)] if held else []

    def _look_for_begin(self) -> None:
        start = self._held.lstrip()
        if self._has_begun or (len(start) < len(OPEN) and OPEN.startswith(start)):
            return  # it may still become the tag
        self._has_begun = True
        if start.startswith(OPEN):
            self._is_inside = self.has_opened = True
            self._held = start[len(OPEN) :].lstrip("\n")

    def _close(self) -> list[tuple[str, bool]]:
        before, _, after = self._held.partition(CLOSE)
        was_inside, self._is_inside, self.has_closed = self._is_inside, False, True
        self._held = after
        # Where the template had opened it, what came so far was shown as text: so is the tag.
        return [(before, True)] if was_inside else [(before, False), (CLOSE, False)]


def without_thought(text: str) -> tuple[str, str]:
    """(answer, reasoning) of a whole text; a thought that was never opened ends at its closing tag."""
    before, tag, after = text.partition(CLOSE)
    if not tag:
        start = text.lstrip()
        return ("", start[len(OPEN) :].strip()) if start.startswith(OPEN) else (text, "")
    return after.lstrip("\n"), before.strip().removeprefix(OPEN).strip()


def _overlap(text: str, tag: str) -> int:
    """How many last characters of `text` may be the tag's beginning."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
