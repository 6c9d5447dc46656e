"""The frame codec: bit-exact, valid protobuf, and what it refuses to send."""

from __future__ import annotations

import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from proto import codec, ring_pb2
from proto.codec import PART_BYTES, FrameAssembler, Tensor, WireError, encode
from tests.frames import raw, step


def decode(messages: list[bytes]) -> tuple[ring_pb2.Frame, list[Tensor]]:
    assembler = FrameAssembler()
    for message in messages[:-1]:
        assert assembler.feed(message) is None
        assert not assembler.is_idle
    whole = assembler.feed(messages[-1])
    assert whole is not None
    assert assembler.is_idle
    return whole


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
