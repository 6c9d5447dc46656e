"""One request as the scheduler keeps it. Pure; guarded by the lock that guards the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from proto import ring_pb2

State = Literal["queued", "prefill", "decode"]


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
    num_sent: int = 0  # tokens of prompt + answer that entered the ring
    num_in_flight: int = 0  # frames of this session in the ring
    num_completion: int = 0
    next_token: int | None = None  # sampled, not yet sent
    written: list[int] = field(default_factory=list)  # sampled, but for the last one where the answer ended
    from_session: int = 0  # whose copy it begins as; 0: nobody's
    num_cached: int = 0  # tokens of the prompt that come with that
    is_active: bool = False  # it runs; else it waits
    is_open: bool = False  # its spec has entered the ring

    @property
    def is_prefilling(self) -> bool:
        return self.num_sent < len(self.prompt)

    @property
    def num_reserved(self) -> int:
        """Tokens its caches may come to hold."""
        return len(self.prompt) + self.max_tokens

    @property
    def sent_tokens(self) -> list[int]:
        """What its caches hold once all frames are through."""
        return [*self.prompt, *self.written][: self.num_sent]

    @property
    def is_chunk_due(self) -> bool:
        """A part of the prompt goes next, by itself: any but the last token, and whatever comes first."""
        return self.num_sent < len(self.prompt) - 1 or not self.is_open

    @property
    def is_row_due(self) -> bool:
        """One token goes next, and may share a frame: the prompt's last, or the one drawn last."""
        return not self.is_chunk_due and (self.is_prefilling or self.next_token is not None)

    @property
    def can_send(self) -> bool:
        return self.is_chunk_due or self.is_row_due

    @property
    def state(self) -> State:
        """It waits, its prompt is read, or its answer is written."""
        if not self.is_active:
            return "queued"
        return "decode" if self.num_completion else "prefill"
