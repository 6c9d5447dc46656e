"""One block of tool calls as it grows. Pure but for the calls' random ids.

Arguments are passed on as they come where they are JSON in the text, or one by one where each has tags; other
notations when their block ends.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.open_call import JsonObject, OpenCall, TaggedArguments
from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part
from cluster.api.tool_families import ToolFamily

_ALPHABET = string.ascii_letters + string.digits
_NUM_ID_CHARS = 24


class CallReader:
    """The text that follows a family's start marker. `feed` until `rest` is not None, or `finish`.

    `num_read` characters of the answer stand before it.
    """

    def __init__(
        self,
        family: ToolFamily,
        tools: Sequence[Mapping[str, Any]],
        num_calls: int = 0,
        num_read: int = 0,
    ) -> None:
        self.num_calls = num_calls  # of the whole answer so far
        self.rest: str | None = None  # what follows the end marker
        self._family = family
        self._tools = tools
        self._num_before = num_calls
        self._held = ""  # not decided yet
        self.num_read = num_read  # characters before it, or before `rest`
        self._open: OpenCall | None = None

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        while self.rest is None and (self._grow(parts) if self._open else self._find_next(parts)):
            pass
        return parts

    def finish(self, *, is_cut: bool = False) -> list[Part]:
        """The answer ended within the block. A call that was cut is never taken for a whole one."""
        parts: list[Part] = []
        held, self.rest = self._held, ""
        self._drop(len(held))
        if self._open is None:
            self._parse(held, parts, may_be_whole=not is_cut or not self._family.end)
            return parts
        piece = "" if is_cut else self._open.end(held)
        if piece:
            parts.append(CallArguments(self.num_calls - 1, piece))
        parts.append(CallEnd(self.num_calls - 1, not (is_cut or self._open.is_broken)))
        return parts

    def _drop(self, size: int) -> None:
        """So much of what is held was read."""
        self._held = self._held[size:]
        self.num_read += size

    @property
    def _is_after_call(self) -> bool:
        return self.num_calls > self._num_before

    def _grow(self, parts: list[Part]) -> bool:
        """Passes arguments on; False where the text is used up."""
        assert self._open is not None
        piece, size = self._open.take(self._held)
        self._drop(size)
        if piece:
            parts.append(CallArguments(self.num_calls - 1, piece))
        if not self._open.is_over:
            return False
        parts.append(CallEnd(self.num_calls - 1, not self._open.is_broken))
        self._open = None
        return True

    def _find_next(self, parts: list[Part]) -> bool:
        """Looks for a call or the block's end; False where there is neither yet, or the block has ended."""
        growing, tagged, end = self._family.growing, self._family.tagged, self._family.end
        place = self._held.find(end) if end else -1
        before_end = len(self._held) if place < 0 else place
        if growing is not None:
            tail = growing.tail.match(self._held) if self._is_after_call else None
            head = growing.head.match(self._held, tail.end() if tail else 0)
            if head is not None and head.end() <= before_end:
                return self._begin_open(head, JsonObject(), parts)
        if tagged is not None and (tagged.call_end or not self._is_after_call):
            head = tagged.head.match(self._held)
            if head is not None and head.end() <= before_end:
                call = TaggedArguments(self._family, tagged, self._tools, head[0])
                return self._begin_open(head, call, parts)
        if place >= 0:
            block, self.rest = self._held[:place], self._held[place + len(end) :]
            self._drop(place + len(end))
            self._held = ""
            self._parse(block, parts, end)
        return False

    def _begin_open(self, head: re.Match[str], call: OpenCall, parts: list[Part]) -> bool:
        self._drop(head.end())
        self._begin(head["name"], head.groupdict().get("id"), parts)
        self._open = call
        return True

    def _parse(self, block: str, parts: list[Part], end: str = "", *, may_be_whole: bool = True) -> None:
        """The calls of a block that did not grow; it is content if there are none."""
        if self._is_after_call:
            growing = self._family.growing
            tail = growing.tail.match(block) if growing is not None else None
            block = block[tail.end() :] if tail else block
            if not block.strip(" \t\r\n{}[],"):
                return
        try:
            calls = self._family.parse(block, self._tools) if may_be_whole else []
        except ValueError:
            calls = []
        for call in calls:
            self._begin(call.name, call.id, parts)
            parts.append(CallArguments(self.num_calls - 1, call.arguments))
            parts.append(CallEnd(self.num_calls - 1))
        if not calls:
            before = "" if self._is_after_call else self._family.start
            text = before + block + ("" if self._is_after_call else end)
            parts.append(Content(text, self.num_read - len(before + block + end)))

    def _begin(self, name: str, own_id: str | None, parts: list[Part]) -> None:
        parts.append(CallStart(self.num_calls, own_id or self._new_id(), name))
        self.num_calls += 1

    def _new_id(self) -> str:
        size = self._family.num_id_chars
        letters = "".join(secrets.choice(_ALPHABET) for _ in range(size or _NUM_ID_CHARS))
        return letters if size else f"call_{letters}"
