"""Requests that no frame could carry are refused by the head, and the ring goes on for the others."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import grpc
import pytest

from cluster.head import MAX_SAMPLING_BYTES, MAX_TOP_LOGPROBS, Head
from cluster.room import Limits
from proto import head_pb2, ring_pb2
from proto.codec import MAX_HEADER_BYTES, encode

VOCAB_SIZE = 1 << 18
PREFILL_CHUNK = 4096


class Aborted(Exception):  # noqa: N818
    """What context.abort raised."""


class Call:
    """A handler's context."""

    def add_callback(self, callback: object) -> bool:
        return True

    def abort(self, code: grpc.StatusCode, message: str) -> None:
        raise Aborted(code, message)


@pytest.fixture
def frames() -> SimpleQueue[ring_pb2.Frame]:
    return SimpleQueue()


@pytest.fixture
def head(frames: SimpleQueue[ring_pb2.Frame]) -> Head:
    def feed(frame: ring_pb2.Frame) -> None:
        encode(frame)  # as an edge does, with its limits
        frames.put(frame)

    made = Head(max_queued=0, feed=feed, cluster_status=head_pb2.ClusterStatus, changed=threading.Condition())
    made.ring_up(1, Limits(2 * PREFILL_CHUNK, 1, 2, PREFILL_CHUNK, VOCAB_SIZE))
    return made


def request(sampling: ring_pb2.Sampling) -> head_pb2.GenerateRequest:
    prompt = [VOCAB_SIZE - 1] * (PREFILL_CHUNK + 1)
    return head_pb2.GenerateRequest(prompt=prompt, max_tokens=3, sampling=sampling)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (
            ring_pb2.Sampling(logit_bias=dict.fromkeys(range(150_000), 1.0)),
            "logit_bias, stop_ids and grammar: together",
        ),
        (
            ring_pb2.Sampling(stop_ids=[VOCAB_SIZE - 1] * 400_000),
            "logit_bias, stop_ids and grammar: together",
        ),
        (ring_pb2.Sampling(logprobs=True, top_logprobs=MAX_TOP_LOGPROBS + 1), "from 0 to 1024"),
    ],
    ids=["bias", "stop", "top"],
)
def test_what_no_frame_can_carry_is_refused(head: Head, sampling: ring_pb2.Sampling, words: str) -> None:
    for _ in range(3):  # no frame is counted as in the ring
        with pytest.raises(Aborted, match=words) as refused:
            list(head.Generate(request(sampling), Call()))  # type: ignore[arg-type]
        assert refused.value.args[0] is grpc.StatusCode.INVALID_ARGUMENT
    status = head_pb2.ClusterStatus()
    head.fill(status)
    assert status.num_active == 0


def test_an_adapter_name_that_is_none_is_refused(head: Head) -> None:
    asked = head_pb2.GenerateRequest(prompt=[1], max_tokens=1, adapter="x" * 129)
    with pytest.raises(Aborted, match="adapter: a name has at most 128 characters"):
        list(head.Generate(asked, Call()))  # type: ignore[arg-type]


def test_the_largest_request_and_its_first_chunk_fit_a_frame(
    head: Head, frames: SimpleQueue[ring_pb2.Frame]
) -> None:
    sampling = ring_pb2.Sampling(stop_ids=[VOCAB_SIZE - 1] * (MAX_SAMPLING_BYTES // 3 - 4))
    assert MAX_SAMPLING_BYTES - 16 < sampling.ByteSize() <= MAX_SAMPLING_BYTES

    def generate() -> None:
        with pytest.raises(Aborted, match="enough"):
            list(head.Generate(request(sampling), Call()))  # type: ignore[arg-type]

    handler = threading.Thread(target=generate)
    handler.start()
    frame = frames.get(timeout=20.0)
    assert len(frame.slots[0].tokens) == PREFILL_CHUNK
    result = ring_pb2.Slot(session=frame.slots[0].session, error="enough")
    head.on_result(ring_pb2.Frame(epoch=1, seq=frame.seq, slots=[result]))
    handler.join(5.0)
    assert not handler.is_alive()
    assert frame.ByteSize() <= MAX_HEADER_BYTES


def test_no_ring_comes_up_in_a_head_that_stops(head: Head) -> None:
    head.close()
    head.ring_up(2, Limits(64, 1, 2))
    with pytest.raises(Aborted, match="the head is stopping"):
        list(head.Generate(request(ring_pb2.Sampling()), Call()))  # type: ignore[arg-type]
