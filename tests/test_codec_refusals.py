"""The frame codec's receiving side: every lie from the wire is refused with a sentence, and costs little."""

from __future__ import annotations

import random

import pytest

from proto import ring_pb2
from proto.codec import MIN_PART_BYTES, PART_BYTES, FrameAssembler, WireError, encode
from tests.frames import raw, rebuilt, step


# -- whole messages ---------------------------------------------------------------------------------------
def meta(dtype: int, *shape: int) -> ring_pb2.TensorMeta:
    return ring_pb2.TensorMeta(dtype=dtype, shape=shape)  # type: ignore[arg-type]


def with_tensors(*metas: ring_pb2.TensorMeta, total: int, num_tensors: int | None = None) -> ring_pb2.Frame:
    frame = step(len(metas) if num_tensors is None else num_tensors, payload_total_bytes=total)
    frame.tensors.extend(metas)
    return frame


LIES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "a frame is of unknown kind 0"),
    ("noise", b"\xff" * 50, "a message of 50 bytes is not a frame"),
    ("unknown kind", ring_pb2.Frame(kind=77).SerializeToString(), "a frame is of unknown kind 77"),  # type: ignore[arg-type]
    ("header beyond the message", b"\x0d\xff\xff\xff\xff" + bytes(20), "claims a header of 4294967295"),
    ("header shorter than itself", b"\x0d\x03\0\0\0" + bytes(20), "claims a header of 3"),
    (
        "payload without header_bytes",
        step(0).SerializeToString() + b"\x7a\x01a",
        "a frame's payload is not where its header says",
    ),
    (
        "no payload tag",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=4), b"abcd").replace(
            b"\x7a\x04abcd", b"\x72\x04abcd"
        ),
        "a frame's header is not followed by its payload",
    ),
    (
        "payload length",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=4), b"abcd")[:-1],
        "a payload of 3 bytes claims to have 4",
    ),
    (
        "payload length without end",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=4), b"abcd")[:-5] + b"\xff" * 9,
        "a payload's length is cut short",
    ),
    (
        "unknown dtype",
        rebuilt(with_tensors(meta(99, 4), total=4), b"abcd"),
        "tensors of dtype 'number 99' cannot be sent",
    ),
    (
        "no dtype",
        rebuilt(with_tensors(meta(0, 4), total=4), b"abcd"),
        "tensors of dtype 'number 0' cannot be sent",
    ),
    (
        "nine dimensions",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, *[1] * 9), total=1), b"a"),
        "a tensor has 9 dimensions, more than 8",
    ),
    (
        "a product that overflows 64 bits to 4",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 2**31, 2**31, 2**2, 1), total=4), b"abcd"),
        "a tensor (2147483648, 2147483648, 4, 1) of uint8 is over the limit",
    ),
    (
        "total above the tensors",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=5), b"abcde"),
        "announces 5 payload bytes from byte 0; its tensors need 4",
    ),
    (
        "total below the tensors",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=3), b"abc"),
        "announces 3 payload bytes from byte 0; its tensors need 4",
    ),
    (
        "a first message that is not the beginning",
        rebuilt(
            with_tensors(meta(ring_pb2.UINT8, 4), total=4),
            b"abcd",
            lambda frame: setattr(frame, "payload_offset_bytes", 4),
        ),
        "from byte 4; its tensors need 4 from byte 0",
    ),
    (
        "more payload than announced",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=4), b"abcdef"),
        "frame 9 announces 4 payload bytes and begins with 6",
    ),
    (
        "a short first part",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 2**20), total=2**20), b"abcdef"),
        "frame 9 announces 1048576 payload bytes and begins with 6",
    ),
    (
        "tensors without payload",
        with_tensors(meta(ring_pb2.UINT8, 4), total=4).SerializeToString(),
        "frame 9 announces 4 payload bytes and begins with 0",
    ),
    (
        "tensors of no slot",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=4, num_tensors=0), b"abcd"),
        "frame 9 has 1 tensors; its slots count 0",
    ),
    (
        "slots that claim too many",
        rebuilt(with_tensors(meta(ring_pb2.UINT8, 4), total=4, num_tensors=2**32 - 1), b"abcd"),
        "frame 9 has 1 tensors; its slots count 4294967295",
    ),
    (
        "too many slots",
        ring_pb2.Frame(
            kind=ring_pb2.STEP, slots=[ring_pb2.Slot(session=i) for i in range(1025)]
        ).SerializeToString(),
        "frame 0 has 1025 slots, more than 1024",
    ),
    (
        "too many tensors",
        ring_pb2.Frame(
            kind=ring_pb2.STEP, tensors=[ring_pb2.TensorMeta(dtype=ring_pb2.UINT8, shape=[0])] * 4097
        ).SerializeToString(),
        "frame 0 has 4097 tensors, more than 4096",
    ),
    (
        "too many opens",
        ring_pb2.Frame(kind=ring_pb2.STEP, opens=[ring_pb2.SessionSpec()] * 1025).SerializeToString(),
        "frame 0 opens 1025 sessions and ends 0; the limits are 1024 and 65536",
    ),
    (
        "too many copies",
        ring_pb2.Frame(kind=ring_pb2.STEP, forks=[ring_pb2.Fork()] * 1025).SerializeToString(),
        "frame 0 opens 1025 sessions and ends 0; the limits are 1024 and 65536",
    ),
    (
        "a beat that copies",
        ring_pb2.Frame(kind=ring_pb2.BEAT, forks=[ring_pb2.Fork()]).SerializeToString(),
        "a BEAT carries more than it may",
    ),
    (
        "a session twice",
        ring_pb2.Frame(kind=ring_pb2.STEP, slots=[ring_pb2.Slot(session=4)] * 2).SerializeToString(),
        "frame 0 has two slots of session 4",
    ),
    (
        "a position out of this world",
        ring_pb2.Frame(
            kind=ring_pb2.STEP, slots=[ring_pb2.Slot(session=4, position=2**32 - 1)]
        ).SerializeToString(),
        "a slot of session 4 ends beyond position 1073741824",
    ),
    (
        "a novel in structure",
        ring_pb2.Frame(kind=ring_pb2.STEP, slots=[ring_pb2.Slot(structure="[" * 70_000)]).SerializeToString(),
        "a slot of session 0 has a text of over 65536 characters",
    ),
    (
        "a header of megabytes",
        ring_pb2.Frame(kind=ring_pb2.STEP, slots=[ring_pb2.Slot()] * 600_000).SerializeToString(),
        "a frame header of 1200002 bytes is over the limit of 1048576",
    ),
    (
        "part without frame",
        rebuilt(ring_pb2.Frame(kind=ring_pb2.PART, seq=9, epoch=3), b"abc"),
        "a part of frame 9 came, and no such frame is open",
    ),
    ("hello without hello", ring_pb2.Frame(kind=ring_pb2.HELLO).SerializeToString(), "a HELLO says nothing"),
    (
        "a beat with luggage",
        ring_pb2.Frame(kind=ring_pb2.BEAT, slots=[ring_pb2.Slot()]).SerializeToString(),
        "a BEAT carries more than it may",
    ),
]


@pytest.mark.parametrize(("message", "sentence"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_lies_are_refused_with_a_sentence(message: bytes, sentence: str) -> None:
    with pytest.raises(WireError) as caught:
        FrameAssembler().feed(message)
    assert sentence in str(caught.value)


def test_a_frame_beyond_the_receivers_limit_is_refused_at_its_first_part() -> None:
    messages = encode(step(), [raw(3 * PART_BYTES)])
    with pytest.raises(WireError, match="frame 9 has 3145728 payload bytes, over the limit of 2097152"):
        FrameAssembler(2 * PART_BYTES).feed(messages[0])


# -- parts ------------------------------------------------------------------------------------------------
def change_part(message: bytes, **fields: int) -> bytes:
    part = ring_pb2.Frame.FromString(message)
    payload = part.payload
    part.ClearField("payload")
    for name, value in fields.items():
        setattr(part, name, value)
    return rebuilt(part, payload)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seq": 10}, "a part of frame 10 came, and no such frame is open"),
        ({"epoch": 2}, "a part of frame 9 came, and no such frame is open"),
        ({"payload_offset_bytes": 0}, "has offset 0 of 3145728, expected 1048576 of 3145728"),
        ({"payload_offset_bytes": 2**64 - 1}, "has offset 18446744073709551615 of 3145728"),
        ({"payload_total_bytes": 7}, "has offset 1048576 of 7, expected 1048576 of 3145728"),
    ],
)
def test_parts_out_of_order(change: dict[str, int], sentence: str) -> None:
    messages = encode(step(), [raw(3 * PART_BYTES)])
    assembler = FrameAssembler()
    assembler.feed(messages[0])
    with pytest.raises(WireError) as caught:
        assembler.feed(change_part(messages[1], **change))
    assert sentence in str(caught.value)


def test_a_part_twice_or_skipped_or_interrupted() -> None:
    messages = encode(step(), [raw(3 * PART_BYTES)])
    for second in (messages[2], messages[0], encode(step(), [raw(10)])[0]):
        assembler = FrameAssembler()
        assembler.feed(messages[0])
        with pytest.raises(WireError):
            assembler.feed(second)
    assembler = FrameAssembler()
    assembler.feed(messages[0])
    assembler.feed(messages[1])
    with pytest.raises(WireError, match="has offset 1048576 of 3145728, expected 2097152"):
        assembler.feed(messages[1])


def test_a_part_that_is_too_short_too_long_or_carries_slots() -> None:
    head = encode(step(), [raw(3 * PART_BYTES)])[0]

    def part(payload: bytes, **fields: object) -> bytes:
        frame = ring_pb2.Frame(kind=ring_pb2.PART, epoch=3, seq=9, **fields)  # type: ignore[arg-type]
        frame.payload_total_bytes, frame.payload_offset_bytes = 3 * PART_BYTES, PART_BYTES
        return rebuilt(frame, payload)

    for message, sentence in (
        (part(bytes(MIN_PART_BYTES - 1)), "has 65535 bytes at 1048576 of 3145728"),
        (part(bytes(2 * PART_BYTES + 1)), "has 2097153 bytes at 1048576 of 3145728"),
        (part(bytes(PART_BYTES), closes=[1]), "a part of frame 9 carries more than payload"),
    ):
        assembler = FrameAssembler()
        assembler.feed(head)
        with pytest.raises(WireError) as caught:
            assembler.feed(message)
        assert sentence in str(caught.value)


# -- what a lie costs -------------------------------------------------------------------------------------
def test_a_claimed_size_costs_no_memory_before_its_bytes_come() -> None:
    """Frames that are never finished hold what was sent of them; the claim itself is not touched."""
    import resource

    def rss_kib() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    total = 200 << 20
    frame = with_tensors(meta(ring_pb2.UINT8, total), total=total)
    message = rebuilt(frame, bytes(MIN_PART_BYTES))
    before = rss_kib()
    assemblers = [FrameAssembler() for _ in range(8)]
    for assembler in assemblers:
        assert assembler.feed(message) is None
    assert rss_kib() - before < 50 << 10


def test_random_bytes_raise_nothing_but_wire_errors() -> None:
    rng = random.Random(2)
    valid = [m for n in (0, 10, 9000) for m in encode(step(), [raw(n)])] + [lie[1] for lie in LIES[:28]]
    num_refused = 0
    for _ in range(4000):
        message = bytearray(
            rng.choice(valid)[:4000] if rng.random() < 0.8 else rng.randbytes(rng.randrange(60))
        )
        for _ in range(rng.randrange(4)):
            if message:
                message[rng.randrange(len(message))] = rng.randrange(256)
        try:
            FrameAssembler().feed(bytes(message))
        except WireError:
            num_refused += 1
    assert num_refused > 2000
