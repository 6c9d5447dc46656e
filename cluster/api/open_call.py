"""A tool call whose arguments are still coming: JSON that grows, or tags around each argument. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.api.tool_families import TaggedCalls, ToolFamily

_STRUCTURE = re.compile(r'["{}\[\]<]')
_IN_STRING = re.compile(r'["\\]')


class OpenCall(Protocol):
    """Takes the text that follows a call's name."""

    is_over: bool
    is_broken: bool  # it did not end as it should have

    def take(self, text: str) -> tuple[str, int]:
        """The next piece of the arguments as JSON, and how many characters it was made of."""
        ...

    def end(self, text: str) -> str:
        """The last piece, where the model ended its answer."""
        ...


class JsonObject:
    """Arguments that are JSON in the text: finds where they end."""

    __slots__ = ("_depth", "_is_escaped", "_is_in_string", "is_broken", "is_over")

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = self._is_escaped = False
        self.is_over = False
        self.is_broken = False  # by a `<` outside its strings: the model wrote a marker instead

    def take(self, text: str) -> tuple[str, int]:
        """All of the text, unless it `is_over`."""
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
                return text[: found.start()], found.start()
            self._is_escaped = sign == "\\"
            self._is_in_string ^= sign == '"'
            self._depth += (sign in "{[") - (sign in "}]")
            if self._depth == 0 and sign in "}]":
                self.is_over = True
                return text[:place], place
        return text, len(text)

    def end(self, text: str) -> str:
        self.is_broken = True
        return text


class TaggedArguments:
    """Arguments with tags around each: parsed anew, by the family's parser, whenever one is whole.

    An argument may hold the markers of the call's end: what is between its tags is its own.
    """

    __slots__ = ("_family", "_shown", "_tags", "_text", "_tools", "is_broken", "is_over")

    def __init__(
        self, family: ToolFamily, tags: TaggedCalls, tools: Sequence[Mapping[str, Any]], head: str
    ) -> None:
        self._family = family
        self._tags = tags
        self._tools = tools
        self._text = head  # of the call so far
        self._shown: set[str] = set()
        self.is_over = self.is_broken = False

    def take(self, text: str) -> tuple[str, int]:
        pieces: list[str] = []
        tags, place = self._tags, 0
        while not self.is_over:
            ends = text.find(tags.call_end or self._family.end, place)
            opens = text.find(tags.start, place)
            if opens >= 0 and (ends < 0 or opens < ends):
                closes = text.find(tags.end, opens)
                if closes < 0:
                    break
                closes += len(tags.end)
                self._text += text[place:closes]
                place = closes
                pieces.append(self._new_arguments())
            elif ends >= 0:
                self._text += text[place:ends]
                place = ends + len(tags.call_end)
                pieces.append(self._last_piece())
                self.is_over = True
            else:
                break
        return "".join(pieces), place

    def end(self, text: str) -> str:
        self._text += text
        self.is_broken = self._tags.start in text
        return "" if self.is_broken else self._last_piece()

    def _new_arguments(self) -> str:
        new = {name: value for name, value in self._parse().items() if name not in self._shown}
        if not new:
            return ""
        before = ", " if self._shown else "{"
        self._shown.update(new)
        return before + json.dumps(new, ensure_ascii=False)[1:-1]

    def _last_piece(self) -> str:
        piece = self._new_arguments()
        return f"{piece}}}" if self._shown else "{}"

    def _parse(self) -> Mapping[str, Any]:
        text = self._text + self._tags.closing
        for tools in (self._tools, ()):  # a value that is not of the type that the schema says stays a text
            try:
                call, *_ = self._family.parse(text, tools)
            except ValueError:
                continue
            arguments: Mapping[str, Any] = json.loads(call.arguments)
            return arguments
        return {}
