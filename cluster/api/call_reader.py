"""One block of tool calls as it grows. Pure but for the calls' random ids.

Arguments that are JSON in the text are passed on as they come; other notations when their block ends.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part
from cluster.api.tool_families import ToolFamily

_ALPHABET = string.ascii_letters + string.digits
_NUM_ID_CHARS = 24
_STRUCTURE = re.compile(r'["{}\[\]<]')
_IN_STRING = re.compile(r'["\\]')


class JsonObject:
    """Finds where a JSON object in a growing text ends."""

    __slots__ = ("_depth", "_is_escaped", "_is_in_string", "is_broken", "is_over")

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = self._is_escaped = False
        self.is_over = False
        self.is_broken = False  # by a `<` outside its strings: the model wrote a marker instead

    def take(self, text: str) -> int:
        """How many of the next characters belong to the object; all of them unless `is_over`."""
        place = 0
        while place < len(text):
            if self._is_escaped:
                self._is_escaped = False
                place += 1
                continue
            found = (_IN_STRING if self._is_in_string else _STRUCTURE).search(text, place)
            if found is None:
                break
            place, sign = found.end(), found[0]
            if sign == "<":
                self.is_over = self.is_broken = True
                return found.start()
            self._is_escaped = sign == "\\"
            self._is_in_string ^= sign == '"'
            self._depth += (sign in "{[") - (sign in "}]")
            if self._depth == 0 and sign in "}]":
                self.is_over = True
                return place
        return len(text)


class CallReader:
    """The text that follows a family's start marker. `feed` until `rest` is not None, or `finish`."""

    def __init__(self, family: ToolFamily, tools: Sequence[Mapping[str, Any]], num_calls: int = 0) -> None:
        self.num_calls = num_calls  # of the whole answer so far
        self.rest: str | None = None  # what follows the end marker
        self._family = family
        self._tools = tools
        self._num_before = num_calls
        self._held = ""  # not decided yet
        self._object: JsonObject | None = None  # of the call that is open

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        while self.rest is None and (self._grow(parts) if self._object else self._find_next(parts)):
            pass
        return parts

    def finish(self, *, is_cut: bool = False) -> list[Part]:
        """The answer ended within the block. A call that was cut is never taken for a whole one."""
        parts: list[Part] = []
        held, self._held, self.rest = self._held, "", ""
        if self._object is not None:
            parts.append(CallEnd(self.num_calls - 1, is_complete=False))
        else:
            self._parse(held, parts, may_be_whole=not is_cut or not self._family.end)
        return parts

    @property
    def _is_after_call(self) -> bool:
        return self.num_calls > self._num_before

    def _grow(self, parts: list[Part]) -> bool:
        """Passes arguments on; False where the text is used up."""
        assert self._object is not None
        size = self._object.take(self._held)
        if size:
            parts.append(CallArguments(self.num_calls - 1, self._held[:size]))
            self._held = self._held[size:]
        if not self._object.is_over:
            return False
        parts.append(CallEnd(self.num_calls - 1, not self._object.is_broken))
        self._object = None
        return True

    def _find_next(self, parts: list[Part]) -> bool:
        """Looks for a call or the block's end; False where there is neither yet, or the block has ended."""
        growing, end = self._family.growing, self._family.end
        if growing is not None:
            tail = growing.tail.match(self._held) if self._is_after_call else None
            head = growing.head.match(self._held, tail.end() if tail else 0)
            if head is not None:
                self._held = self._held[head.end() :]
                self._begin(head["name"], head.groupdict().get("id"), parts)
                self._object = JsonObject()
                return True
        place = self._held.find(end) if end else -1
        if place >= 0:
            block, self.rest = self._held[:place], self._held[place + len(end) :]
            self._held = ""
            self._parse(block, parts, end)
        return False

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
            parts.append(Content(block if self._is_after_call else self._family.start + block + end))

    def _begin(self, name: str, own_id: str | None, parts: list[Part]) -> None:
        parts.append(CallStart(self.num_calls, own_id or self._new_id(), name))
        self.num_calls += 1

    def _new_id(self) -> str:
        size = self._family.num_id_chars
        letters = "".join(secrets.choice(_ALPHABET) for _ in range(size or _NUM_ID_CHARS))
        return letters if size else f"call_{letters}"
