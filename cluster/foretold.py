"""What a draft model says will come, as far as nothing speaks against it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Drafted:
    """The draft model's answer: `ids` may follow the first `position` tokens.

    No ids: nothing likely enough, the draft model has not read that far yet, or there is none.
    own_ms: what it took for that itself, in which it read num_read tokens, its guesses not counted.
    """

    position: int
    ids: list[int]
    own_ms: float = 0.0
    num_read: int = 0


@dataclass(slots=True)
class Foretold:
    """Of one answer. position: known tokens, which is where `ids` begin."""

    position: int
    ids: list[int] = field(default_factory=list)
    asked: int = -1  # where those begin that the draft model was asked for last; -1: it has answered
    num_asked: int = 0
    is_held: bool = False  # the answer's next frame waits for them
    is_reading: bool = False  # it was given tokens to read, and has not said that it has
    num_given: int = 0  # tokens, of the text's beginning, that it was ever given
    is_wanted: bool = False  # it may have something to do for this answer
    is_ended: bool = False  # behind `ids` nothing is likely enough
    _since: list[int] = field(default_factory=list)  # known tokens from `asked` on

    def after(self, ahead: Sequence[int]) -> list[int]:
        """What follows the guesses on their way; nothing if they are others."""
        return self.ids[len(ahead) :] if self.ids[: len(ahead)] == list(ahead) else []

    @property
    def is_awaited(self) -> bool:
        """What comes next was asked for, and there is no answer yet."""
        return self.asked >= 0 and not self.ids

    def ask(self, num_tokens: int) -> int:
        """So many more are asked for; the position that they follow."""
        self.asked, self.num_asked, self._since = self.position + len(self.ids), num_tokens, []
        self.num_given, self.is_wanted = self.asked, True
        return self.asked

    def read(self) -> None:
        """It is given all known tokens, and asked for nothing."""
        self._forget()
        self.is_reading, self.num_given, self.is_wanted = True, self.position, True

    def rest(self) -> None:
        """What it said, or was asked, counts no more."""
        self._forget()
        self.is_reading = self.is_wanted = False

    def tell(self, position: int, ids: Sequence[int]) -> bool:
        """The draft model's answer; False where it is not the one that is waited for."""
        if self.is_reading and position == self.num_given:
            self.is_reading = False
            return True
        if position != self.asked:
            return False
        self.asked, self.is_held = -1, False
        self.is_ended = len(ids) < self.num_asked
        since, self._since = self._since, []
        if list(ids[: len(since)]) == since:
            self.ids += ids[len(since) :]
        self.is_ended &= not since or bool(self.ids)
        return True

    def extend(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The answer goes on with `tokens`; how many of them were foretold, and how many otherwise."""
        num_right = num_wrong = 0
        for token in tokens:
            self.position += 1
            if self.ids:
                is_right = self.ids.pop(0) == token
                num_right, num_wrong = num_right + is_right, num_wrong + (not is_right)
                if not is_right:
                    self._forget()
            elif self.asked == self.position - 1 - len(self._since):
                self._since.append(token)
            else:
                self._forget()
        if not self.ids:
            self.is_ended = False
        return num_right, num_wrong

    def _forget(self) -> None:
        self.ids.clear()
        self._since.clear()
        self.asked, self.is_held, self.is_ended = -1, False, False
