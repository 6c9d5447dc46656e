"""One answer as it grows: tokens from the head in, text out, stop strings and log-probabilities too. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.api.part_tokens import PartTokens
from cluster.api.parts import Content, Part, PartReader, Reasoning
from cluster.api.stop import StopFilter
from cluster.tokenizer import Tokenizer
from proto import head_pb2, ring_pb2

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What a request says about turning tokens into text."""

    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    is_stop_included: bool = False
    min_tokens: int = 0
    skip_special: bool = True
    keeps_tokens: bool = False  # ids or log-probabilities go to the client
    shows_reasoning: bool = True
    make_reader: Callable[[], PartReader] | None = None  # of an answer with reasoning or tool calls
    shown_ids: frozenset[int] = frozenset()  # special tokens that the reader wants to see
    is_scored: bool = False  # the answer begins with the prompt, and how probable its tokens were
    is_written: bool = True  # False: only the prompt is of interest


@dataclass(slots=True)
class Delta:
    """What one reply of the head added, or all replies together."""

    text: str = ""
    tokens: list[ring_pb2.SampledToken] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # where each token's text begins, in characters
    prompt: list[ring_pb2.SampledToken] = field(default_factory=list)  # where it is scored; the first: NaN
    prompt_offsets: list[int] = field(default_factory=list)
    stop_string: str = ""  # the client's own that ended a whole answer
    parts: list[Part] | None = None  # what the text means; None: all of it is content
    text_tokens: list[ring_pb2.SampledToken] = field(default_factory=list)  # which bear it then

    def as_parts(self) -> list[Part]:
        """The parts of an answer, whether or not it has a reader."""
        if self.parts is not None:
            return self.parts
        return [Content(self.text, tokens=tuple(self.text_tokens))] if self.text else []


class Choice:
    """The state of one answer. `feed` until `finish_reason` is set."""

    __slots__ = (
        "_detokenizer",
        "_echo",
        "_kept",
        "_num_chars",
        "_num_echo_chars",
        "_num_taken_chars",
        "_options",
        "_part_tokens",
        "_reader",
        "_stop",
        "finish_reason",
        "index",
        "num_reasoning_tokens",
        "num_tokens",
    )

    def __init__(
        self, index: int, prompt: list[int], options: TextOptions, tokenizer: Tokenizer, num_echoed: int = 0
    ) -> None:
        self.index = index
        self.finish_reason = ""
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self._options = options
        self._reader = options.make_reader() if options.make_reader is not None else None
        self._detokenizer = tokenizer.detokenizer(
            prompt, skip_special=options.skip_special, shown_ids=options.shown_ids
        )
        self._stop = (
            StopFilter(options.stops, is_included=options.is_stop_included) if options.stops else None
        )
        self._part_tokens = PartTokens() if self._reader is not None or options.keeps_tokens else None
        self._kept = Delta()
        self._num_chars = self._num_taken_chars = num_echoed
        self._echo = tokenizer.detokenizer([], skip_special=False) if options.is_scored else None
        self._num_echo_chars = 0
        if options.is_scored:
            self._score(ring_pb2.SampledToken(id=prompt[0], logprob=math.nan))

    @property
    def stop_string(self) -> str:
        """The stop string that ended it, or empty."""
        return "" if self._stop is None else self._stop.matched

    def hear(self, reply: head_pb2.GenerateReply) -> None:
        """What comes before the first token: how probable those of the prompt were."""
        for token in reply.prompt:
            self._score(token)

    def feed(self, reply: head_pb2.GenerateReply) -> Delta | None:
        """The text that may be shown now, with the tokens and log-probabilities held back so far.

        None while there is nothing to show. Tokens after a stop string are not counted.
        """
        text = ""
        for token in reply.tokens if self._options.is_written else ():
            text += self._add(token)
            if self._stop is not None and self._stop.is_matched:
                self.finish_reason = "stop"
                return self._end(text, is_cut=True)
        if reply.finish_reason:
            self.finish_reason = reply.finish_reason if self._options.is_written else "length"
            text += self._filtered(self._detokenizer.flush())
            if self._stop is not None:
                text += self._stop.flush()
            return self._end(text, is_cut=reply.finish_reason != "stop")
        if self._reader is not None:
            return self._read(self._reader, text)
        # A token of no text is shown to a client that counts tokens, unless it may be part of a stop string.
        return self._take(text) if text or (self._kept.tokens and self._stop is None) else None

    def _read(self, reader: PartReader, text: str) -> Delta | None:
        parts = self._with_tokens(reader.feed(text))
        if reader.is_over:
            self.finish_reason = "tool_calls"
        if not parts and not self.finish_reason and (not self._kept.tokens or self._stop is not None):
            return None
        return self._take(text, parts)

    def _end(self, text: str, *, is_cut: bool) -> Delta:
        if self._reader is None:
            return self._take(text)
        parts = self._with_tokens(self._reader.feed(text) + self._reader.finish(is_cut=is_cut))
        if self._reader.num_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return self._take(text, parts)

    def _add(self, token: ring_pb2.SampledToken) -> str:
        options = self._options
        self.num_tokens += 1
        is_shown = token.id not in options.stop_ids or options.is_stop_included
        text = self._detokenizer.add(token.id) if is_shown else ""
        if self._part_tokens is not None and is_shown:
            self._part_tokens.add(token, self._num_chars)
        if options.keeps_tokens:
            self._kept.tokens.append(token)
            self._kept.offsets.append(self._num_chars)
        self._num_chars += len(text)
        return self._filtered(text)

    def _score(self, token: ring_pb2.SampledToken) -> None:
        if self._echo is not None:
            self._kept.prompt.append(token)
            self._kept.prompt_offsets.append(self._num_echo_chars)
            self._num_echo_chars += len(self._echo.add(token.id))

    def _filtered(self, text: str) -> str:
        # As in vLLM, a stop string counts only once it is not part of the first min_tokens tokens.
        if self._stop is None or self.num_tokens <= self._options.min_tokens:
            return text
        return self._stop.push(text)

    def _with_tokens(self, parts: list[Part]) -> list[Part]:
        """Those that are shown, content with the tokens that bear it; those of reasoning are counted."""
        assert self._part_tokens is not None
        shown: list[Part] = []
        for part in parts:
            if not isinstance(part, Content | Reasoning):
                shown.append(part)
                continue
            taken = self._part_tokens.take(part.start, part.start + len(part.text))
            if isinstance(part, Content):
                shown.append(replace(part, tokens=tuple(taken)) if self._options.keeps_tokens else part)
                continue
            self.num_reasoning_tokens += len(taken)
            if self._options.shows_reasoning:
                shown.append(part)
        return shown

    def _take(self, text: str, parts: list[Part] | None = None) -> Delta:
        kept, self._kept = self._kept, Delta()
        kept.text, kept.parts = text, parts
        if parts is None and self._part_tokens is not None:
            start = self._num_taken_chars
            self._num_taken_chars += len(text)
            kept.text_tokens = self._part_tokens.take(start, self._num_taken_chars)
        return kept


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)


def known(token: ring_pb2.SampledToken) -> bool:
    """Whether it has a log-probability: the first token of a prompt, behind nothing, has none."""
    return not math.isnan(token.logprob)
