"""What a stage tells the next one of a frame, and what it notes of its slots itself."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.session import Session
from proto import ring_pb2


def advance(sessions: Sequence[Session], slots: Sequence[ring_pb2.Slot]) -> None:
    """The sessions read the tokens of their slots."""
    for session, slot in zip(sessions, slots, strict=True):
        session.position += len(slot.tokens)


def take_back(sessions: Sequence[Session], slots: Sequence[ring_pb2.Slot]) -> None:
    """They did not."""
    for session, slot in zip(sessions, slots, strict=True):
        session.position -= len(slot.tokens)


def answer_to(frame: ring_pb2.Frame) -> ring_pb2.Frame:
    """From the last stage, without slots yet."""
    return ring_pb2.Frame(kind=ring_pb2.RESULT, epoch=frame.epoch, seq=frame.seq)


def passed_on(frame: ring_pb2.Frame) -> ring_pb2.Frame:
    """From any other one."""
    return ring_pb2.Frame(
        kind=ring_pb2.STEP,
        epoch=frame.epoch,
        seq=frame.seq,
        opens=frame.opens,
        closes=frame.closes,
        keeps=frame.keeps,
        keep_tokens=frame.keep_tokens,
        forks=frame.forks,
    )


def add_read(out: ring_pb2.Frame, slot: ring_pb2.Slot, error: str) -> ring_pb2.Slot:
    """The next stage reads the same tokens; error: why not, "" where it does."""
    return out.slots.add(
        session=slot.session,
        position=slot.position,
        tokens=slot.tokens,
        is_sampled=slot.is_sampled,
        num_draws=slot.num_draws,
        error=error,
    )


def add_failed(out: ring_pb2.Frame, slot: ring_pb2.Slot, error: str) -> None:
    """It ends here."""
    out.slots.add(session=slot.session, position=slot.position, is_sampled=slot.is_sampled, error=error)
