"""Prompts that become a vector: how they are cut, and that nothing follows or stays."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.instructions import Emit, Fail, FailureKind, Instruction
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from tests.test_scheduler import answer, frames, greedy

LAST = ring_pb2.Sampling(pooling=ring_pb2.Pooling(kind=ring_pb2.Pooling.LAST))


def up(*, room: int = 2, chunk: int = 8, shared: int = 4) -> Scheduler:
    scheduler = Scheduler(max_queued=2)
    limits = Limits(
        64, room, 4, chunk, vocab_size=100, trim_window=64, shared_chunk=shared, share=lambda n: n / 64
    )
    scheduler.ring_up(7, limits)
    return scheduler


def cut(sent: Sequence[ring_pb2.Frame]) -> list[int]:
    return [len(frame.slots[0].tokens) for frame in sent]


def read(scheduler: Scheduler, frame: ring_pb2.Frame, vector: bytes = b"") -> list[Instruction]:
    slot = ring_pb2.Slot(session=frame.slots[0].session, position=frame.slots[0].position, vector=vector)
    return scheduler.on_result(frame.epoch, frame.seq, [slot])


def test_all_tokens_are_read_and_none_is_drawn() -> None:
    scheduler = up()
    sent = frames(scheduler.submit("a", list(range(12)), 99, LAST))
    assert cut(sent) == [4, 4, 4]  # a text's last token goes with the others
    assert not any(frame.slots[0].is_sampled or frame.is_batched for frame in sent)
    assert sent[0].opens[0].sampling == LAST
    assert sent[0].opens[0].max_tokens == 0
    assert not read(scheduler, sent[0])
    assert not read(scheduler, sent[1])
    told = read(scheduler, sent[2], b"1234")
    (emit,) = (one for one in told if isinstance(one, Emit))
    assert (emit.vector, emit.finish_reason, emit.num_prompt, emit.num_completion) == (b"1234", "stop", 12, 0)
    (closing,) = frames(told)  # at once: nothing of it is kept
    assert (list(closing.closes), list(closing.keeps)) == ([1], [])
    assert (scheduler.num_active, scheduler.num_kept, scheduler.num_in_flight) == (0, 0, 0)
    assert scheduler.counters.num_completion_tokens == 0


def test_the_same_text_is_read_in_the_same_parts_whatever_others_do() -> None:
    scheduler = up()
    (writing,) = frames(scheduler.submit("w", [3], 5, greedy()))
    assert writing.slots[0].is_sampled
    assert cut(frames(scheduler.submit("a", list(range(12)), 0, LAST))) == [4, 4, 4]


def test_a_text_that_is_read_shortens_no_prompt() -> None:
    """Nobody waits for its next token."""
    scheduler = up()
    assert frames(scheduler.submit("v", [3], 0, LAST))
    assert cut(frames(scheduler.submit("a", list(range(12)), 2, greedy())))[0] == 8


def test_what_is_kept_of_others_is_of_no_use_to_it() -> None:
    scheduler = up()
    prompt = list(range(20))
    sent = frames(scheduler.submit("a", prompt, 1, greedy()))
    while sent:
        sent += frames(answer(scheduler, sent.pop(0))) if sent[0].slots else []
        sent = [frame for frame in sent if frame.slots]
    assert scheduler.num_kept == 1
    first = frames(scheduler.submit("b", prompt, 0, LAST))[0]
    assert (first.opens[0].from_session, first.slots[0].position) == (0, 0)


def test_it_waits_for_room_and_takes_only_that_of_its_text() -> None:
    scheduler = up(room=1)
    scheduler.submit("a", list(range(32)), 0, LAST)
    scheduler.submit("b", list(range(32)), 0, LAST)  # exactly what is left
    scheduler.submit("c", [1], 0, LAST)
    assert (scheduler.num_active, scheduler.num_queued) == (2, 1)


def test_a_text_as_long_as_the_context_fits_and_one_token_more_is_refused() -> None:
    scheduler = up()
    assert frames(scheduler.submit("a", [1] * 64, 0, LAST))
    (told,) = scheduler.submit("b", [1] * 65, 0, LAST)
    assert isinstance(told, Fail)
    assert told.kind is FailureKind.INVALID
    assert told.message.startswith("the context is 64 tokens, but the prompt has 65")


def test_a_client_that_leaves_frees_it() -> None:
    scheduler = up()
    sent = frames(scheduler.submit("a", list(range(40)), 0, LAST))
    (closing,) = frames(scheduler.cancel("a"))
    assert (list(closing.closes), len(closing.slots)) == ([1], 0)
    assert scheduler.num_active == 0
    for frame in sent:  # what was on its way comes back to nobody
        assert read(scheduler, frame, b"1234") == []


def test_a_last_stage_that_gives_nothing_fails_the_request() -> None:
    scheduler = up()
    (sent,) = frames(scheduler.submit("a", [1, 2], 0, LAST))
    failed = [one for one in read(scheduler, sent) if isinstance(one, Fail)]
    assert [one.message for one in failed] == ["the last stage drew no token"]
