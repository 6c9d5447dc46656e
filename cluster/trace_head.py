"""What the head records of frames while somebody traces it. With the head's lock held, or just after."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from cluster.instructions import Emit, Instruction
from cluster.trace_recorder import Kind, recorder
from proto import ring_pb2


def note_fed(frame: ring_pb2.Frame) -> None:
    """It enters the ring now."""
    now, slots = time.perf_counter(), frame.slots
    for opened in frame.opens:
        recorder.add(Kind.OPENED, frame.seq, now, now, numbers=(opened.session,), text=opened.request_id)
    num_tokens = sum(len(slot.tokens) for slot in slots)
    numbers = (num_tokens, int(slots[0].is_sampled), *(slot.session for slot in slots))
    recorder.add(Kind.FED, frame.seq, now, now, numbers=numbers)


def note_returned(frame: ring_pb2.Frame, began: float, instructions: Sequence[Instruction]) -> None:
    """Its RESULT came at `began`, and all that follows from it, `instructions`, has been done.

    Tokens count where the answer has them: not those drawn behind a wrong guess, or behind its end.
    """
    taken = Counter(one.session for one in instructions if isinstance(one, Emit))
    numbers: list[int] = []
    for slot in frame.slots:
        numbers += slot.session, taken[slot.session]
    recorder.add(Kind.RETURNED, frame.seq, began, time.perf_counter(), numbers=numbers)
