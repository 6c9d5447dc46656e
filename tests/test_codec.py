"""The frame codec: bit-exact, valid protobuf, and every lie from the wire refused with a sentence."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from proto import codec, ring_pb2
from proto.codec import MIN_PART_BYTES, PART_BYTES, FrameAssembler, Tensor, WireError, encode


def step(num_tensors: int = 1, **fields: object) -> ring_pb2.Frame:
    frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=3, seq=9, **fields)  # type: ignore[arg-type]
    frame.slots.add(session=5, position=77, tokens=(1, 2**31 - 1), num_tensors=num_tensors, is_sampled=True)
    return frame


def raw(nbytes: int, seed: int = 1) -> Tensor:
    return Tensor("uint8", (nbytes,), random.Random(seed).randbytes(nbytes))


def decode(messages: list[bytes]) -> tuple[ring_pb2.Frame, list[Tensor]]:
    assembler = FrameAssembler()
    for message in messages[:-1]:
        assert assembler.feed(message) is None
        assert not assembler.is_idle
    whole = assembler.feed(messages[-1])
    assert whole is not None
    assert assembler.is_idle
    return whole


def rebuilt(
    frame: ring_pb2.Frame, payload: bytes, change: Callable[[ring_pb2.Frame], object] | None = None
) -> bytes:
    """A message as encode() makes it, of a frame that encode() itself would not make."""
    if change is not None:
        change(frame)
    return codec._append_payload(frame, [payload])


# -- what goes through ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", sorted(codec.ITEM_BYTES))
def test_every_dtype_is_bit_exact(dtype: str) -> None:
    data = random.Random(dtype).randbytes(3 * 2 * codec.ITEM_BYTES[dtype])
    frame, tensors = decode(encode(step(), [Tensor(dtype, (3, 2), data)]))
    assert (tensors[0].dtype, tensors[0].shape, bytes(tensors[0].data)) == (dtype, (3, 2), data)
    assert frame.slots[0].tokens == [1, 2**31 - 1]


def test_all_bf16_patterns_survive() -> None:
    """NaN payloads, infinities, denormals and both zeros included."""
    patterns = np.arange(2**16, dtype=np.uint16)
    _, tensors = decode(encode(step(), [Tensor("bfloat16", (256, 256), patterns.tobytes())]))
    got = np.frombuffer(tensors[0].data, ml_dtypes.bfloat16)
    assert (got.view(np.uint16) == patterns).all()


@pytest.mark.parametrize("nbytes", [1, 127, 128, 8192, PART_BYTES - 1, PART_BYTES])
def test_a_message_is_a_valid_protobuf_frame(nbytes: int) -> None:
    tensor = raw(nbytes)
    (message,) = encode(step(), [tensor])
    parsed = ring_pb2.Frame.FromString(message)
    assert parsed.payload == tensor.data
    assert message[parsed.header_bytes] == 0x7A, "header_bytes leads to the payload's tag"
    assert type(message) is bytes, "gRPC takes nothing else"
    assert bytes(decode([message])[1][0].data) == tensor.data


@pytest.mark.parametrize("nbytes", [PART_BYTES + 1, 2 * PART_BYTES, 5 * PART_BYTES + 12345])
def test_a_long_payload_goes_in_parts(nbytes: int) -> None:
    tensors = [raw(nbytes - 1000, 1), raw(1000, 2)]
    messages = encode(step(2), tensors)
    assert len(messages) == -(-nbytes // PART_BYTES)
    assert max(map(len, messages)) < PART_BYTES + 200
    assert b"".join(ring_pb2.Frame.FromString(m).payload for m in messages) == b"".join(
        bytes(t.data) for t in tensors
    )
    _, got = decode(messages)
    assert [bytes(t.data) for t in got] == [t.data for t in tensors]


def test_decoded_tensors_can_be_sent_on_without_a_copy_in_between() -> None:
    for nbytes in (8192, 3 * PART_BYTES):
        frame, tensors = decode(encode(step(), [raw(nbytes)]))
        _, again = decode(encode(frame, tensors))
        assert isinstance(tensors[0].data, memoryview)
        assert bytes(again[0].data) == raw(nbytes).data


def test_encoding_a_frame_twice_leaves_nothing_of_the_first_time() -> None:
    frame = step(0)
    encode(frame, [])
    frame.slots[0].num_tensors = 2
    encode(frame, [raw(10), raw(20)])
    frame.slots[0].num_tensors = 1
    got, tensors = decode(encode(frame, [raw(30)]))
    assert len(got.tensors) == len(tensors) == 1
    assert got.payload_total_bytes == 30


def test_empty_and_scalar_tensors() -> None:
    tensors = [
        Tensor("float32", (0, 4), b""),
        Tensor("float32", (), b"\0\0\x80?"),
        Tensor("uint8", (2,) * 8, bytes(256)),
    ]
    _, got = decode(encode(step(3), tensors))
    assert [(t.shape, bytes(t.data)) for t in got] == [(t.shape, t.data) for t in tensors]
    _, got = decode(encode(step(1), tensors[:1]))
    assert got[0].shape == (0, 4)


def test_beats_may_come_between_parts() -> None:
    first, second = encode(step(), [raw(PART_BYTES + 5)])
    beat = ring_pb2.Frame(kind=ring_pb2.BEAT, beat=ring_pb2.Beat(progress=4)).SerializeToString()
    assembler = FrameAssembler()
    assert assembler.feed(first) is None
    between = assembler.feed(beat)
    assert between is not None
    assert between[0].beat.progress == 4
    whole = assembler.feed(second)
    assert whole is not None
    assert bytes(whole[1][0].data) == raw(PART_BYTES + 5).data


# -- what we refuse to send -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (Tensor("float8", (1,), b"a"), "tensors of dtype 'float8' cannot be sent"),
        (Tensor("uint8", (1,) * 9, b"a"), "a tensor has 9 dimensions, more than 8"),
        (Tensor("float32", (2,), b"abc"), "a float32 tensor (2,) has 3 bytes, not 8"),
    ],
)
def test_a_tensor_that_cannot_be_sent(tensor: Tensor, sentence: str) -> None:
    with pytest.raises(WireError) as caught:
        encode(step(), [tensor])
    assert str(caught.value) == sentence


def test_limits_hold_on_the_sending_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(WireError, match=r"a frame of 1200 payload bytes is over the limit of 1000"):
        encode(step(2), [raw(600), raw(600)])
    with pytest.raises(WireError, match=r"a frame header of \d+ bytes is over the limit of 1048576"):
        encode(step(0, closes=range(2**40, 2**40 + 200_000)))


# -- what we refuse from the wire -------------------------------------------------------------------------
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
        "frame 0 opens 1025 sessions and closes 0; the limits are 1024 and 65536",
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


def test_a_single_part_payload_is_not_copied() -> None:
    (message,) = encode(step(), [raw(PART_BYTES)])
    assembler = FrameAssembler()
    tracemalloc.start()
    try:
        whole = assembler.feed(message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert whole is not None
    assert peak < 64 << 10
