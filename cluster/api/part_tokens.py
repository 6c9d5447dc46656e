"""Which of an answer's tokens bear which part of its text. Pure."""

from __future__ import annotations

from collections import deque

from proto import ring_pb2


class PartTokens:
    """Tokens wait here, each with where its text begins, until the part comes that they bear.

    Parts come in the text's own order. What stands between them (markers, calls, white space that is dropped)
    is nobody's. A token that ends one part and begins the next is the first one's.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, ring_pb2.SampledToken]] = deque()

    def add(self, token: ring_pb2.SampledToken, start: int) -> None:
        """The answer's next token, whose text begins with its character `start`."""
        self._waiting.append((start, token))

    def take(self, start: int, stop: int) -> list[ring_pb2.SampledToken]:
        """Those that bear the characters [start, stop); none that was taken before."""
        waiting, taken = self._waiting, []
        while waiting and waiting[0][0] < stop:
            begin, token = waiting.popleft()
            end = waiting[0][0] if waiting else stop
            if begin >= start or end > start:  # the first of a character's tokens have no text by themselves
                taken.append(token)
        return taken
