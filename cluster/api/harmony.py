"""Answers of gpt-oss as parts: messages with a header each (github.com/openai/harmony, docs/format.md). Pure.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
"""

from __future__ import annotations

import re
import secrets

from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Part, Reasoning
from cluster.api.stop import num_held

TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_BODY = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=functions\.([^\s<]+)")


class HarmonyReader:
    """Reads one answer. Reasoning is the channel analysis, and what is said to tools of the model's own."""

    def __init__(
        self,
        *,
        has_tools: bool = False,
        is_continued: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self.num_calls = 0
        self.is_over = False
        self._has_tools = has_tools
        self._max_calls = max_calls
        self._kind: type[Content | Reasoning | CallArguments] | None = Content if is_continued else None
        self._held = ""  # a header, or what may begin a marker
        self._num_read = 0  # characters before it

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        while not self.is_over and (
            self._read_header(parts) if self._kind is None else self._read_body(parts)
        ):
            pass
        return parts

    def finish(self, *, is_cut: bool = False) -> list[Part]:
        """What was held back; a header that nothing followed is dropped."""
        parts: list[Part] = []
        if self._kind is not None and not self.is_over:
            self._show(len(self._held), parts)
            self._end(parts, is_complete=not is_cut)
        self._held = ""
        return parts

    def _read_header(self, parts: list[Part]) -> bool:
        header, found, rest = self._held.partition(_BODY)
        if not found:
            return False
        self._num_read += len(header) + len(_BODY)
        self._held = rest
        channel, function = _CHANNEL.search(header), _FUNCTION.search(header)
        if function is not None and self._has_tools:
            self._kind = CallArguments
            call_id = f"call_{secrets.token_hex(12)}"
            parts.append(CallStart(self.num_calls, call_id, function[1]))
            self.num_calls += 1
        elif channel is not None and (channel[1] == "analysis" or "to=" in header):
            self._kind = Reasoning
        else:
            self._kind = Content
        return True

    def _read_body(self, parts: list[Part]) -> bool:
        places = [(place, end) for end in _ENDS if (place := self._held.find(end)) >= 0]
        if not places:
            keep = num_held(self._held, _ENDS)
            self._show(len(self._held) - keep, parts)
            return False
        place, end = min(places)
        self._show(place, parts)
        self._held = self._held[len(end) :]
        self._num_read += len(end)
        self._end(parts)
        return True

    def _show(self, size: int, parts: list[Part]) -> None:
        """So much of what is held."""
        text, start = self._held[:size], self._num_read
        self._held = self._held[size:]
        self._num_read += size
        if not text:
            return
        if self._kind is CallArguments:
            parts.append(CallArguments(self.num_calls - 1, text))
        elif self._kind is Content:
            parts.append(Content(text, start))
        else:
            parts.append(Reasoning(text, start))

    def _end(self, parts: list[Part], *, is_complete: bool = True) -> None:
        if self._kind is CallArguments:
            parts.append(CallEnd(self.num_calls - 1, is_complete))
            self.is_over = self.num_calls == self._max_calls
        self._kind = None
