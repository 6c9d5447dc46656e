"""The one frame that a step on the device waits for. Pure values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.ahead import Kind, kind_of


@dataclass(frozen=True, slots=True)
class Awaited:
    """The next token of one session. begin: any thread, once: the step has its numbers, token and carry."""

    epoch: int
    session: int
    position: int
    carry: Kind
    structure: str
    vocab_size: int
    begin: Callable[[Sequence[int], Sequence[Tensor]], None]

    def is_in(self, frame: ring_pb2.Frame, tensors: Sequence[Tensor]) -> bool:
        """Whether it is this frame, and nothing else is asked for in it."""
        if frame.epoch != self.epoch or len(frame.slots) != 1:
            return False
        if frame.opens or frame.closes or frame.keeps or frame.forks:
            return False
        slot = frame.slots[0]
        return (
            slot.session == self.session
            and slot.position == self.position
            and len(slot.tokens) == 1
            and slot.tokens[0] < self.vocab_size
            and slot.is_sampled
            and not slot.error
            and slot.structure == self.structure
            and kind_of(tensors) == self.carry
        )
