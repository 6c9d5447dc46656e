"""What an answer's text is made of: content, reasoning and tool calls. Pure.

A PartReader (`MessageReader`) makes parts of the text as it comes; an endpoint writes them in its way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from proto import ring_pb2


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user. `tokens` bear it, where log-probabilities are asked for."""

    text: str
    start: int = field(default=0, compare=False)  # characters of the answer before it, markers and all
    tokens: tuple[ring_pb2.SampledToken, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str
    start: int = field(default=0, compare=False)  # as Content's


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; its arguments follow in pieces. `index` counts the answer's calls."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, which together are a JSON object as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """No more comes for this call; each one that began has an end."""

    index: int
    is_complete: bool = True  # False: the answer ended within it


Part = Content | Reasoning | CallStart | CallArguments | CallEnd


class PartReader(Protocol):
    """Text in pieces to parts. The pieces may be cut anywhere: the joined parts are the same."""

    num_calls: int  # that have begun
    is_over: bool  # there are as many calls as were asked for: no part follows

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        ...

    def finish(self, *, is_cut: bool = False) -> list[Part]:
        """What was held back, when no more text comes; `is_cut`: not because the model ended its answer."""
        ...


@dataclass(slots=True)
class Call:
    """A whole tool call; `arguments` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str = ""
    is_complete: bool = False


@dataclass(slots=True)
class Message:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Message:
        """The message that `parts` make, from the answer's first to its last."""
        contents, reasonings, calls = [], [], []
        arguments: list[list[str]] = []
        for part in parts:
            match part:
                case Content(text):
                    contents.append(text)
                case Reasoning(text):
                    reasonings.append(text)
                case CallStart(_, call_id, name):
                    calls.append(Call(call_id, name))
                    arguments.append([])
                case CallArguments(index, text):
                    arguments[index].append(text)
                case CallEnd(index, is_complete):
                    calls[index].is_complete = is_complete
        for call, pieces in zip(calls, arguments, strict=True):
            call.arguments = "".join(pieces)
        return cls("".join(contents), "".join(reasonings), calls)
