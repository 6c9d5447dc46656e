"""What the scheduler tells the head to do. Pure values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from proto import ring_pb2


class FailureKind(Enum):
    """Why a request ended without an answer; the head maps it to a gRPC status."""

    INVALID = "invalid"  # it can never run
    BUSY = "busy"  # the queue is full
    LATE = "late"  # it waited in the queue as long as it may
    UNAVAILABLE = "unavailable"  # the ring is not serving, or it broke
    FAILED = "failed"  # a stage failed on this request alone
    CANCELLED = "cancelled"  # by its id, by somebody else than the client that waits


@dataclass(frozen=True, slots=True)
class Send:
    """Put this frame header into the ring."""

    frame: ring_pb2.Frame


@dataclass(frozen=True, slots=True)
class Start:
    """The request waits no longer: its first chunk enters the ring now."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Emit:
    """A token for the client, or the vector that it asked for; `finish_reason` is set on the last one."""

    request_id: str
    token: ring_pb2.SampledToken
    finish_reason: str
    num_prompt: int
    num_completion: int
    num_cached: int = 0  # of the prompt's tokens, not read again
    session: int = 0
    vector: bytes = b""  # instead of a token


@dataclass(frozen=True, slots=True)
class Score:
    """The next tokens of its prompt, with their log-probabilities, for the client."""

    request_id: str
    tokens: Sequence[ring_pb2.SampledToken]


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends with an error."""

    request_id: str
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class Draft:
    """Ask the draft model what may follow `tokens`; num_drafts 0: it only reads them. See DraftCall."""

    epoch: int
    session: int
    tokens: Sequence[int]
    num_drafts: int
    sampling: ring_pb2.Sampling
    num_prompt: int


@dataclass(frozen=True, slots=True)
class EndDrafts:
    """The session needs no draft model any more; or for a while, after which it goes on where it was."""

    session: int
    is_over: bool = True


Instruction = Send | Start | Score | Emit | Fail | Draft | EndDrafts
