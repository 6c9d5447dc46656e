"""Frames to messages and back, without IO; any thread.

The header is protobuf; the payload is appended to it by hand as the message's last field, so that tensor
bytes never pass through the protobuf runtime, and the whole is still a valid Frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from google.protobuf.message import DecodeError

from proto import ring_pb2

PART_BYTES = 1 << 20  # payload bytes per message: within gRPC's plateau, and short on a slow link
MIN_PART_BYTES = 64 << 10  # of a part that is not its frame's last
MAX_HEADER_BYTES = 1 << 20
MAX_FRAME_BYTES = 256 << 20  # payload of all parts together
MAX_RANK = 8
MAX_SLOTS = 1024
MAX_TENSORS = 4096
MAX_CLOSES = 1 << 16
MAX_POSITION = 1 << 30
MAX_TEXT_BYTES = 64 << 10

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "int8": 1, "int16": 2, "int32": 4,
    "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8,
}  # fmt: skip
_DTYPE_OF_NAME = {name: ring_pb2.DType.Value(name.upper()) for name in ITEM_BYTES}
_NAME_OF_DTYPE = {number: name for name, number in _DTYPE_OF_NAME.items()}

_HEADER_BYTES_TAG = 0x0D  # field 1, fixed32
_HEADER_BYTES_LEN = 5
_PAYLOAD_TAG = 0x7A  # field 15, length-delimited
_KINDS = frozenset(ring_pb2.Kind.values()) - {ring_pb2.KIND_UNSPECIFIED}
_STEP_KINDS = frozenset((ring_pb2.STEP, ring_pb2.RESULT))


_Meta = tuple[str, tuple[int, ...], int]  # dtype, shape, bytes


class WireError(ValueError):
    """What came from the wire, or should go there, breaks the frame format; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One leaf of a carry: row-major, little-endian bytes."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: bytes | memoryview  # of single bytes: prod(shape) * ITEM_BYTES[dtype]


def encode(frame: ring_pb2.Frame, tensors: Sequence[Tensor] = ()) -> list[bytes]:
    """The messages of one frame: itself, and PARTs where the payload is longer than PART_BYTES.

    Fills frame.tensors, payload_total_bytes and header_bytes. Raises WireError for what the other side would
    refuse.
    """
    del frame.tensors[:]
    for tensor in tensors:
        nbytes = _tensor_bytes(tensor.dtype, tensor.shape)
        if nbytes != len(tensor.data):
            raise WireError(
                f"a {tensor.dtype} tensor {tensor.shape} has {len(tensor.data)} bytes, not {nbytes}"
            )
        frame.tensors.add(dtype=_DTYPE_OF_NAME[tensor.dtype], shape=tensor.shape)
    total = sum(len(tensor.data) for tensor in tensors)
    if total > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {total} payload bytes is over the limit of {MAX_FRAME_BYTES}")
    frame.payload_total_bytes = total
    if total == 0:
        frame.header_bytes = 0
        message = frame.SerializeToString()
        _check_header_size(len(message))
        return [message]
    if total <= PART_BYTES:
        return [_append_payload(frame, [tensor.data for tensor in tensors])]
    parts = _parts(tensors)
    messages = [_append_payload(frame, next(parts))]
    for offset, chunks in zip(range(PART_BYTES, total, PART_BYTES), parts, strict=True):
        part = ring_pb2.Frame(
            kind=ring_pb2.PART,
            epoch=frame.epoch,
            seq=frame.seq,
            payload_total_bytes=total,
            payload_offset_bytes=offset,
        )
        messages.append(_append_payload(part, chunks))
    return messages


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[memoryview]]:
    """The payload in pieces of PART_BYTES, each a list of views: only the messages are copies."""
    chunks: list[memoryview] = []
    room = PART_BYTES
    for tensor in tensors:
        rest = memoryview(tensor.data)
        while rest:
            chunks.append(rest[:room])
            rest, room = rest[room:], room - len(chunks[-1])
            if not room:
                yield chunks
                chunks, room = [], PART_BYTES
    if chunks:
        yield chunks


def _append_payload(frame: ring_pb2.Frame, chunks: Sequence[bytes | memoryview]) -> bytes:
    frame.header_bytes = 1  # any value but the default: the field must be there; its bytes are written below
    header = frame.SerializeToString()
    if header[0] != _HEADER_BYTES_TAG:
        raise AssertionError("the protobuf runtime does not serialise fields in the order of their numbers")
    _check_header_size(len(header))
    payload_bytes = sum(map(len, chunks))
    return b"".join(
        (
            b"\x0d",
            len(header).to_bytes(4, "little"),
            header[_HEADER_BYTES_LEN:],
            b"\x7a",
            _varint(payload_bytes),
            *chunks,
        )
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _check_header_size(nbytes: int) -> None:
    if nbytes > MAX_HEADER_BYTES:
        raise WireError(f"a frame header of {nbytes} bytes is over the limit of {MAX_HEADER_BYTES}")


def _tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    if dtype not in ITEM_BYTES:
        raise WireError(f"tensors of dtype {dtype!r} cannot be sent")
    if len(shape) > MAX_RANK:
        raise WireError(f"a tensor has {len(shape)} dimensions, more than {MAX_RANK}")
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if nbytes > MAX_FRAME_BYTES:
        raise WireError(f"a tensor {tuple(shape)} of {dtype} is over the limit of {MAX_FRAME_BYTES} bytes")
    return nbytes


class FrameAssembler:
    """Decodes the messages of one stream, in order; holds at most one unfinished frame."""

    __slots__ = ("_frame", "_max_frame_bytes", "_metas", "_payload", "_received_bytes")

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._frame: ring_pb2.Frame | None = None  # whose parts are still coming
        self._metas: list[_Meta] = []  # of this frame
        self._payload = memoryview(b"")
        self._received_bytes = 0

    @property
    def is_idle(self) -> bool:
        """No frame is half received."""
        return self._frame is None

    def feed(self, message: bytes) -> tuple[ring_pb2.Frame, list[Tensor]] | None:
        """The frame that this message completes, or None; BEATs may come between parts.

        The tensors' data are views of the message or of the joined parts. Raises WireError; the stream is
        then over.
        """
        frame, payload = _split(message)
        if frame.kind not in _STEP_KINDS:
            if frame.kind == ring_pb2.PART:
                return self._feed_part(frame, payload)
            _check_plain(frame)
            return frame, []
        if self._frame is not None:
            raise WireError(f"frame {frame.seq} begins before all parts of frame {self._frame.seq} came")
        metas = _check_step(frame, self._max_frame_bytes)
        total = frame.payload_total_bytes
        if len(payload) == total:
            return frame, _slice(metas, payload)
        if not MIN_PART_BYTES <= len(payload) < total:
            raise WireError(
                f"frame {frame.seq} announces {total} payload bytes and begins with {len(payload)}"
            )
        self._frame, self._metas = frame, metas
        # Not a bytearray, which writes zeros: a claim must cost no memory before its bytes come.
        self._payload = np.empty(total, np.uint8).data
        self._payload[: len(payload)] = payload
        self._received_bytes = len(payload)
        return None

    def _feed_part(
        self, part: ring_pb2.Frame, payload: memoryview
    ) -> tuple[ring_pb2.Frame, list[Tensor]] | None:
        frame = self._frame
        if frame is None or part.seq != frame.seq or part.epoch != frame.epoch:
            raise WireError(f"a part of frame {part.seq} came, and no such frame is open")
        if part.slots or part.opens or part.closes or part.tensors:
            raise WireError(f"a part of frame {part.seq} carries more than payload")
        total = frame.payload_total_bytes
        end = self._received_bytes + len(payload)
        if part.payload_offset_bytes != self._received_bytes or part.payload_total_bytes != total:
            raise WireError(
                f"a part of frame {part.seq} has offset {part.payload_offset_bytes} of "
                f"{part.payload_total_bytes}, expected {self._received_bytes} of {total}"
            )
        if end > total or (end < total and len(payload) < MIN_PART_BYTES):
            raise WireError(
                f"a part of frame {part.seq} has {len(payload)} bytes at {self._received_bytes} of {total}"
            )
        self._payload[self._received_bytes : end] = payload
        self._received_bytes = end
        if end < total:
            return None
        joined = self._payload.toreadonly()
        self._frame, self._payload = None, memoryview(b"")
        return frame, _slice(self._metas, joined)


def _split(message: bytes) -> tuple[ring_pb2.Frame, memoryview]:
    """The parsed header, and the payload as a view of the message."""
    header_bytes = 0  # in a message without payload all of it is header
    if len(message) >= _HEADER_BYTES_LEN and message[0] == _HEADER_BYTES_TAG:
        header_bytes = int.from_bytes(message[1:_HEADER_BYTES_LEN], "little")
        if not _HEADER_BYTES_LEN <= header_bytes < len(message):
            raise WireError(f"a message of {len(message)} bytes claims a header of {header_bytes}")
    _check_header_size(header_bytes or len(message))
    try:
        frame = ring_pb2.Frame.FromString(message[:header_bytes] if header_bytes else message)
    except DecodeError:
        raise WireError(f"a message of {len(message)} bytes is not a frame") from None
    if frame.header_bytes != header_bytes or frame.payload:
        raise WireError("a frame's payload is not where its header says")
    if frame.kind not in _KINDS:
        raise WireError(f"a frame is of unknown kind {frame.kind}")
    view = memoryview(message)
    if header_bytes == 0:
        return frame, view[:0]
    start, payload_bytes = _read_payload_length(message, header_bytes)
    if start + payload_bytes != len(message):
        raise WireError(f"a payload of {len(message) - start} bytes claims to have {payload_bytes}")
    return frame, view[start:]


def _read_payload_length(message: bytes, offset: int) -> tuple[int, int]:
    """Where the payload begins, and its length by its own varint."""
    if message[offset] != _PAYLOAD_TAG:
        raise WireError("a frame's header is not followed by its payload")
    value = 0
    for i, byte in enumerate(message[offset + 1 : offset + 6]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return offset + 2 + i, value
    raise WireError("a payload's length is cut short")


def _check_plain(frame: ring_pb2.Frame) -> None:
    """HELLO and BEAT carry their own message and nothing else."""
    work = (frame.slots, frame.tensors, frame.opens, frame.closes, frame.keeps, frame.forks)
    if frame.header_bytes or any(work):
        raise WireError(f"a {ring_pb2.Kind.Name(frame.kind)} carries more than it may")
    if frame.kind == ring_pb2.HELLO and not frame.HasField("hello"):
        raise WireError("a HELLO says nothing")


def _check_step(frame: ring_pb2.Frame, max_frame_bytes: int) -> list[_Meta]:
    """Checks all of a STEP or RESULT that needs no knowledge of the model; returns what its tensors are."""
    num_ended = len(frame.closes) + len(frame.keeps)
    num_begun = max(len(frame.opens), len(frame.forks))
    if num_begun > MAX_SLOTS or num_ended > MAX_CLOSES:
        raise WireError(
            f"frame {frame.seq} opens {num_begun} sessions and ends {num_ended}; "
            f"the limits are {MAX_SLOTS} and {MAX_CLOSES}"
        )
    num_tensors = _check_slots(frame)
    tensors = frame.tensors
    if len(tensors) > MAX_TENSORS:
        raise WireError(f"frame {frame.seq} has {len(tensors)} tensors, more than {MAX_TENSORS}")
    if num_tensors != len(tensors) and not frame.is_batched:
        raise WireError(f"frame {frame.seq} has {len(tensors)} tensors; its slots count {num_tensors}")
    metas = []
    total = 0
    for meta in tensors:
        dtype, shape = _NAME_OF_DTYPE.get(meta.dtype, f"number {meta.dtype}"), tuple(meta.shape)
        nbytes = _tensor_bytes(dtype, shape)
        total += nbytes
        metas.append((dtype, shape, nbytes))
    if total > max_frame_bytes:
        raise WireError(f"frame {frame.seq} has {total} payload bytes, over the limit of {max_frame_bytes}")
    if frame.payload_total_bytes != total or frame.payload_offset_bytes:
        raise WireError(
            f"frame {frame.seq} announces {frame.payload_total_bytes} payload bytes from byte "
            f"{frame.payload_offset_bytes}; its tensors need {total} from byte 0"
        )
    return metas


def _check_slots(frame: ring_pb2.Frame) -> int:
    """Returns how many tensors the slots claim together."""
    slots = frame.slots
    if len(slots) > MAX_SLOTS:
        raise WireError(f"frame {frame.seq} has {len(slots)} slots, more than {MAX_SLOTS}")
    num_tensors = 0
    sessions: set[int] = set()
    for slot in slots:
        if slot.session in sessions:
            raise WireError(f"frame {frame.seq} has two slots of session {slot.session}")
        sessions.add(slot.session)
        if slot.position + len(slot.tokens) > MAX_POSITION:
            raise WireError(f"a slot of session {slot.session} ends beyond position {MAX_POSITION}")
        if len(slot.structure) > MAX_TEXT_BYTES or len(slot.error) > MAX_TEXT_BYTES:
            raise WireError(
                f"a slot of session {slot.session} has a text of over {MAX_TEXT_BYTES} characters"
            )
        num_tensors += slot.num_tensors
    return num_tensors


def _slice(metas: list[_Meta], payload: memoryview) -> list[Tensor]:
    tensors = []
    offset = 0
    for dtype, shape, nbytes in metas:
        tensors.append(Tensor(dtype, shape, payload[offset : offset + nbytes]))
        offset += nbytes
    return tensors
