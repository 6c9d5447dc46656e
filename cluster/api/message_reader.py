"""An answer's text as parts: finds the markers around reasoning and tool calls. Pure.

The states and their markers are those of mlx-lm (mlx_lm/generate.py, make_text_state_machine).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from cluster.api.call_reader import CallReader
from cluster.api.parts import CallEnd, CallStart, Content, Part, Reasoning
from cluster.api.reasoning import ThinkMarkers
from cluster.api.stop import num_held
from cluster.api.tool_families import ToolFamily


class State(Enum):
    CONTENT = auto()
    REASONING = auto()
    CALL = auto()
    HEADER = auto()  # text that nobody sees


Edges = tuple[tuple[State, str, State], ...]  # where, a marker, where it leads


@dataclass(frozen=True, slots=True)
class Syntax:
    """How the served model marks the parts of its answers."""

    think: ThinkMarkers | None = None
    family: ToolFamily | None = None
    edges: Edges = ()  # besides those of the two
    initial: State = State.CONTENT

    def markers(self) -> Iterator[str]:
        """The texts that a reader must see, also where they are special tokens."""
        if self.think is not None:
            yield from (self.think.start, self.think.end)
        if self.family is not None:
            yield from (self.family.start, self.family.end, *self.family.tokens)
        yield from (marker for _, marker, _ in self.edges)


class MessageReader:
    """Reads one answer; calls are content without tools. White space between the parts is dropped."""

    def __init__(
        self,
        syntax: Syntax,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        is_reasoning: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self.num_calls = 0
        self.is_over = False  # there are as many calls as were asked for: no part follows
        self._think = syntax.think
        self._family = syntax.family if tools else None
        self._tools = tools
        self._max_calls = max_calls
        self._state = State.REASONING if is_reasoning else syntax.initial
        self._edges = {state: _edges(syntax, self._family, state) for state in State}
        self._held = ""  # may be the beginning of a marker
        self._num_read = 0  # characters before it
        self._space = ""  # dropped unless text of the same part follows
        self._has_content = self._has_reasoning = False
        self._reader: CallReader | None = None

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        while not self.is_over and (self._read_call(parts) if self._reader else self._read_text(parts)):
            pass
        return parts

    def finish(self, *, is_cut: bool = False) -> list[Part]:
        """What was held back, when no more text comes; `is_cut`: not because the model ended its answer."""
        parts: list[Part] = []
        if self.is_over:
            return parts
        if self._reader is not None:
            self._add_calls(self._reader.finish(is_cut=is_cut), parts)
            return parts
        self._show(len(self._held), parts)
        if self._state is State.CONTENT and self._space and self._is_begun:
            parts.append(Content(self._space, self._num_read - len(self._space)))
        self._held = self._space = ""
        return parts

    def _read_call(self, parts: list[Part]) -> bool:
        """Feeds the block of calls; False where all text is used up."""
        assert self._reader is not None
        text, self._held = self._held, ""
        self._add_calls(self._reader.feed(text), parts)
        if self._reader.rest is None:
            return False
        self._held, self._num_read, self._reader = self._reader.rest, self._reader.num_read, None
        self._state = State.CONTENT
        return True

    def _add_calls(self, found: Sequence[Part], parts: list[Part]) -> None:
        for part in found:
            if isinstance(part, CallStart):
                self.num_calls += 1
            self._has_content |= isinstance(part, Content)
            parts.append(part)
            if isinstance(part, CallEnd) and self.num_calls == self._max_calls:
                self.is_over = True
                return

    def _read_text(self, parts: list[Part]) -> bool:
        """Shows what stands before the next marker, or all that cannot begin one."""
        edges, held = self._edges[self._state], self._held
        found = [
            (place, -len(marker), marker, state)
            for marker, state in edges
            if (place := held.find(marker)) >= 0 and self._is_marker(marker, held[:place])
        ]
        if not found:
            keep = num_held(held, (marker for marker, _ in edges))
            self._show(len(held) - keep, parts)
            return False
        place, _, marker, state = min(found, key=lambda match: match[:2])
        self._show(place, parts)
        self._held = self._held[len(marker) :]
        self._num_read += len(marker)
        self._space = ""
        self._state = state
        if state is State.CALL:
            assert self._family is not None
            self._reader = CallReader(self._family, self._tools, self.num_calls, self._num_read)
        return True

    def _is_marker(self, marker: str, before: str) -> bool:
        """`<think>` is one only where no word came before it: later it is a word of the answer."""
        think, family = self._think, self._family
        is_call = family is not None and family.is_first and marker == family.start
        is_thought = think is not None and not think.is_anywhere and marker == think.start
        if not is_call and not is_thought:
            return True
        has_begun = self._has_reasoning if self._state is State.REASONING else self._has_content
        return not has_begun and not before.strip()

    @property
    def _is_begun(self) -> bool:
        """Whether white space belongs to the present part."""
        if self._state is State.REASONING:
            return self._has_reasoning
        return self._has_content or not (self._has_reasoning or self.num_calls)

    def _show(self, size: int, parts: list[Part]) -> None:
        """So much of what is held."""
        text = self._space + self._held[:size]
        self._held = self._held[size:]
        self._num_read += size
        if self._state is State.HEADER:
            return
        if not self._is_begun:
            text = text.lstrip()
        start = self._num_read - len(text)
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if not shown:
            return
        if self._state is State.REASONING:
            self._has_reasoning = True
            parts.append(Reasoning(shown, start))
        else:
            self._has_content = True
            parts.append(Content(shown, start))


def _edges(syntax: Syntax, family: ToolFamily | None, state: State) -> tuple[tuple[str, State], ...]:
    think = syntax.think
    edges = [
        (marker, to)
        for here, marker, to in syntax.edges
        if here is state and (to is not State.CALL or family is not None)
    ]
    has_own_calls = any(to is State.CALL for _, _, to in syntax.edges)
    if think is not None and state is not State.HEADER:
        edges.append((think.start, State.REASONING))
        if state is State.REASONING:
            edges.append((think.end, State.CONTENT))
    if family is not None and (state is State.REASONING or (state is State.CONTENT and not has_own_calls)):
        edges.append((family.start, State.CALL))
    return tuple(edges)
