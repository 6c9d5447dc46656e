"""Frames for the tests of the codec, good ones and ones that encode() would not make."""

from __future__ import annotations

import random
from collections.abc import Callable

from proto import codec, ring_pb2
from proto.codec import Tensor


def step(num_tensors: int = 1, **fields: object) -> ring_pb2.Frame:
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=3, seq=9, **fields)  # type: ignore[arg-type]
    frame.slots.add(session=5, position=77, tokens=(1, 2**31 - 1), num_tensors=num_tensors, is_sampled=True)
    return frame


def raw(nbytes: int, seed: int = 1) -> Tensor:
    return Tensor("uint8", (nbytes,), random.Random(seed).randbytes(nbytes))


def rebuilt(
    frame: ring_pb2.Frame, payload: bytes, change: Callable[[ring_pb2.Frame], object] | None = None
) -> bytes:
    """A message as encode() makes it, of a frame that encode() itself would not make."""
    if change is not None:
        change(frame)
    return codec._append_payload(frame, [payload])
