"""Token ids back to text, one at a time and never half a character. Pure; one object per answer, no lock."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Sequence
from typing import Protocol

# A character is at most 4 bytes, so a longer run that still ends in U+FFFD is not a character to come.
MAX_PENDING_TOKENS = 8
# Earlier tokens that decide whether the first one begins with a space.
NUM_CONTEXT_TOKENS = 6


class Detokenizer(Protocol):
    """`add` gives the text that a token completes, `flush` what is left when no token follows."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class ByteDetokenizer:
    """For tokenizers whose decoder only joins bytes (byte-level BPE, byte fallback). O(bytes) a token."""

    __slots__ = ("_decode", "_piece", "_skipped")

    def __init__(self, piece: Callable[[int], bytes], skipped: Container[int]) -> None:
        self._piece = piece
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token: int) -> str:
        if token in self._skipped:
            return ""
        return self._decode(self._piece(token))

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any other tokenizer: decodes the last few tokens twice, with and without the new one.

    The difference is the new text, held back while it ends in U+FFFD (an unfinished character).
    """

    __slots__ = ("_decode", "_ids", "_prefix", "_read")

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-NUM_CONTEXT_TOKENS:])
        self._prefix = 0
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._take(is_last=False)

    def flush(self) -> str:
        return self._take(is_last=True) if self._read < len(self._ids) else ""

    def _take(self, is_last: bool) -> str:
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        is_open = text.endswith("�") and len(self._ids) - self._read <= MAX_PENDING_TOKENS
        if (is_open and not is_last) or len(text) <= len(known):
            return ""
        del self._ids[: self._prefix]
        self._prefix = self._read - self._prefix
        self._read = len(self._ids)
        return text[len(known) :]
