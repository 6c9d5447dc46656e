"""One request as the scheduler keeps it. Pure; guarded by the lock that guards the scheduler."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.speculation import Drafting, Window
from proto import ring_pb2

State = Literal["queued", "prefill", "decode"]
BY_ITSELF = (sys.maxsize, 0)  # behind all who shared a frame


@dataclass(frozen=True, slots=True)
class PromptWait:
    """For a session to read the first `num_tokens` of its prompt."""

    session: int
    num_tokens: int


@dataclass(slots=True)
class Request:
    """What was asked, and how far it is."""

    request_id: str
    session: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: ring_pb2.Sampling
    stop_ids: frozenset[int]
    adapter: str = ""
    trace_id: str = ""  # for log lines
    priority: int = 0  # lower ones go first
    queued_at_s: float = 0.0
    num_passed: int = 0  # times that one behind it in the queue had room, and went before it
    num_sent: int = 0  # tokens that entered the ring: of the prompt, then known ones, then guesses
    num_read: int = 0  # what the stages' caches hold after the last frame sent, void guesses included
    num_in_flight: int = 0  # frames of this session in the ring
    num_completion: int = 0
    written: list[int] = field(default_factory=list)  # drawn, but for the last one where the answer ended
    windows: deque[Window] = field(default_factory=deque)  # frames on their way after which a token is drawn
    last_window: Window | None = None  # the last frame sent, if one of these
    drafting: Drafting | None = None  # None: no token of it is guessed
    from_session: int = 0  # whose copy it begins as; 0: nobody's
    num_cached: int = 0  # tokens of the prompt that come with that
    began_beside: bool = False  # that one still ran, and may fail
    reads_alone: bool = False  # it began so once, and did not get far
    wait: PromptWait | None = None  # what another one is to read before this one begins
    points: list[int] = field(default_factory=list)  # of its prompt, after which a copy is kept
    lane: int = 0  # it shares frames with those of the same one only
    place: tuple[int, int] = BY_ITSELF  # the last frame that it shared, and its row there
    is_active: bool = False  # it runs; else it waits
    is_open: bool = False  # its spec has entered the ring

    @property
    def is_scored(self) -> bool:
        """The log-probabilities of its prompt are wanted: all of it is read."""
        return self.sampling.prompt_logprobs

    @property
    def is_pooled(self) -> bool:
        """One vector of its whole prompt is wanted: no token is drawn, and nothing of it is kept."""
        return self.sampling.pooling.kind != ring_pb2.Pooling.NONE

    @property
    def reads_all(self) -> bool:
        """Its prompt is read for more than an answer: it begins with nothing that others have read."""
        return self.is_scored or self.is_pooled

    @property
    def can_begin_beside(self) -> bool:
        """It may yet begin with what another one that runs has read."""
        return not (self.is_open or self.reads_alone or self.reads_all)

    @property
    def is_writing(self) -> bool:
        """Its prompt is read but for the last token, behind which an answer is drawn."""
        return not self.is_chunk_due and not self.is_pooled

    @property
    def is_prefilling(self) -> bool:
        return self.num_sent < len(self.prompt)

    @property
    def num_reserved(self) -> int:
        """Tokens its caches may come to hold."""
        return len(self.prompt) + self.max_tokens

    @property
    def num_known(self) -> int:
        """Tokens of the prompt, and of the answer as far as it was drawn."""
        return len(self.prompt) + len(self.written)

    def begin_anew(self, session: int) -> None:
        """As another session of which nothing was sent, and which no other one helps."""
        self.session, self.reads_alone = session, True
        self.num_sent = self.num_read = self.num_in_flight = 0
        self.from_session = self.num_cached = 0
        self.began_beside = self.is_open = False
        self.wait = None
        self.windows.clear()
        self.last_window, self.drafting, self.points, self.place = None, None, [], BY_ITSELF

    def known(self, start: int, stop: int) -> list[int]:
        """The known tokens [start, stop)."""
        length = len(self.prompt)
        return [*self.prompt[start:stop], *self.written[max(start - length, 0) : max(stop - length, 0)]]

    @property
    def is_chunk_due(self) -> bool:
        """A part of the prompt goes next: any but the last token, and whatever comes first."""
        return self.num_sent < len(self.prompt) - (not self.is_pooled) or not self.is_open

    @property
    def is_prompt_due(self) -> bool:
        """The same, and it does not wait for another one to read that."""
        return self.wait is None and self.is_chunk_due

    @property
    def is_last_due(self) -> bool:
        """What goes next of its prompt is the last token."""
        return self.num_sent == len(self.prompt) - 1

    @property
    def is_due(self) -> bool:
        """Known tokens go next: the prompt's last, or those drawn last."""
        if self.is_chunk_due or self.num_sent >= self.num_known:
            return False
        return self.drafting is None or self.drafting.foretold is None or not self.drafting.foretold.is_held

    @property
    def is_row_due(self) -> bool:
        """One token goes next, and may share a frame."""
        return self.is_due and self.num_sent == self.num_known - 1

    @property
    def can_send(self) -> bool:
        return self.is_chunk_due or self.is_due

    @property
    def room(self) -> int:
        """Guesses for which there is room behind the known tokens and the guesses on their way."""
        return self.num_reserved - 1 - max(self.num_sent, self.num_known)

    @property
    def live(self) -> list[Window]:
        """The frames on their way whose draws will be looked at."""
        return [window for window in self.windows if not window.is_void]

    @property
    def ahead(self) -> list[int]:
        """The guesses on their way, in order."""
        guesses: list[int] = []
        for window in self.live:
            guesses += window.tokens if window.is_ahead else window.guesses
        return guesses

    @property
    def state(self) -> State:
        """It waits, its prompt is read, or its answer is written."""
        if not self.is_active:
            return "queued"
        return "decode" if self.num_completion else "prefill"
