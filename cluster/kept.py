"""Sessions whose caches stay on the stages, for prompts that begin like them. Pure.

They are ended ones, and copies of what a prompt had come to at some points of it. The head alone decides what
is kept, what is begun with and what goes, so that all stages agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

MIN_COMMON = 16  # tokens; fewer are read again


@dataclass(frozen=True, slots=True)
class Kept:
    """A session that only waits. tokens: all that its caches hold; share: of the plan's room."""

    session: int
    tokens: Sequence[int]
    adapter: str
    share: float
    is_copy: bool = False  # of a prompt's beginning; else an ended one


@dataclass(slots=True)
class KeptSessions:
    """Least recently used first."""

    _kept: OrderedDict[int, Kept] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, session: int) -> bool:
        return session in self._kept

    @property
    def share(self) -> float:
        """What all of them take together."""
        return sum(kept.share for kept in self._kept.values())

    def add(self, kept: Kept) -> None:
        """As the one used last."""
        self._kept[kept.session] = kept

    def remove(self, session: int) -> Kept:
        """It is kept no more."""
        return self._kept.pop(session)

    def oldest(self) -> Iterator[Kept]:
        """Those to go first; the caller may remove what it gets."""
        yield from list(self._kept.values())

    def clear(self) -> list[Kept]:
        """All sessions, which are forgotten here."""
        sessions = list(self._kept.values())
        self._kept.clear()
        return sessions

    def has(self, tokens: Sequence[int], adapter: str) -> bool:
        """Whether one holds just these tokens."""
        return any(
            kept.adapter == adapter and len(kept.tokens) == len(tokens) and kept.tokens == tokens
            for kept in self._kept.values()
        )

    def match(
        self, prompt: Sequence[int], adapter: str, trim_window: int, busy: Collection[int] = ()
    ) -> tuple[Kept, int] | None:
        """The one to begin with and how many of its tokens, at most all of the prompt's but the last.

        A session of `trim_window` tokens or more can only be begun with as a whole. busy: those of which a
        frame is still in the ring, which may yet fail; of these only copies, of which that frame is the only
        one. What is found counts as used.
        """
        best: tuple[Kept, int] | None = None
        for kept in self._kept.values():
            if kept.adapter != adapter or (kept.session in busy and not kept.is_copy):
                continue
            num_common = common(kept.tokens, prompt, len(prompt) - 1)
            if num_common < len(kept.tokens) and len(kept.tokens) >= trim_window:
                continue
            if num_common >= max(MIN_COMMON, best[1] if best else 0):
                best = kept, num_common
        if best is not None:
            self._kept.move_to_end(best[0].session)
        return best


def common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many tokens both begin with, at most `limit`; O(result) in comparisons of slices."""
    low, high, end = 0, MIN_COMMON, min(len(a), len(b), limit)
    while high < end and a[low:high] == b[low:high]:
        low, high = high, 2 * high
    high = min(high, end)
    if a[low:high] == b[low:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
