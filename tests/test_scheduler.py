from __future__ import annotations

import pytest

from cluster.instructions import Emit, Fail, FailureKind, Instruction, Send, Start
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2


def up(
    *, context: int = 64, max_active: int = 2, max_in_flight: int = 4, chunk: int = 4, queue: int = 2
) -> Scheduler:
    scheduler = Scheduler(max_queued=queue)
    scheduler.ring_up(7, Limits(context, max_active, max_in_flight, chunk, vocab_size=100))
    return scheduler


def frames(instructions: list[Instruction]) -> list[ring_pb2.Frame]:
    return [i.frame for i in instructions if isinstance(i, Send)]


def answer(scheduler: Scheduler, frame: ring_pb2.Frame, token: int = 5, error: str = "") -> list[Instruction]:
    """What the last stage sends back for a frame."""
    slots = [
        ring_pb2.Slot(
            session=s.session,
            position=s.position,
            is_sampled=s.is_sampled,
            error=error,
            result=ring_pb2.SampledToken(id=token) if s.is_sampled else None,
        )
        for s in frame.slots
    ]
    return scheduler.on_result(frame.epoch, frame.seq, slots)


def greedy() -> ring_pb2.Sampling:
    return ring_pb2.Sampling(stop_ids=[9])


def test_prompt_is_cut_as_mlx_lm_cuts_it() -> None:
    scheduler = up(max_in_flight=8)
    sent = frames(scheduler.submit("a", list(range(10)), 3, greedy()))
    assert [list(f.slots[0].tokens) for f in sent] == [[0, 1, 2, 3], [4, 5, 6, 7], [8], [9]]
    assert [f.slots[0].position for f in sent] == [0, 4, 8, 9]
    assert [f.slots[0].is_sampled for f in sent] == [False, False, False, True]
    assert [len(f.opens) for f in sent] == [1, 0, 0, 0]


def test_one_token_prompt_is_sampled_at_once() -> None:
    sent = frames(up().submit("a", [3], 1, greedy()))
    assert len(sent) == 1
    assert sent[0].slots[0].is_sampled


def test_frames_in_flight_are_bounded_and_refilled() -> None:
    scheduler = up(max_in_flight=2)
    sent = frames(scheduler.submit("a", list(range(20)), 3, greedy()))
    assert len(sent) == 2
    more = frames(answer(scheduler, sent[0]))
    assert len(more) == 1
    assert scheduler.num_in_flight == 2


def test_prompts_leave_room_for_decodes_in_a_long_ring() -> None:
    """Of ten frames in flight at most two are of prompts, however many wait."""
    scheduler = Scheduler(max_queued=0)
    scheduler.ring_up(7, Limits(64, 4, 10, 4, vocab_size=100, max_chunks=2))
    (short,) = frames(scheduler.submit("a", [3], 5, greedy()))
    first = frames(scheduler.submit("b", list(range(40)), 2, greedy()))
    assert [len(f.slots[0].tokens) for f in first] == [4]
    assert frames(scheduler.submit("c", list(range(40)), 2, greedy())) == []
    decode, chunk = frames(answer(scheduler, short))
    assert {decode.slots[0].session, chunk.slots[0].session} == {1, 2}
    assert scheduler.num_in_flight == 3
    assert len(frames(answer(scheduler, chunk))) == 1
    scheduler.ring_down("gone")
    scheduler.ring_up(8, Limits(64, 4, 10, 4, vocab_size=100, max_chunks=2))
    assert len(frames(scheduler.submit("d", list(range(40)), 2, greedy()))) == 2


def test_prompts_alone_have_two_frames_for_each_stage() -> None:
    """While an answer is written they have fewer; the answer's first token waits for nobody's turn."""
    scheduler = Scheduler(max_queued=0)
    limits = Limits(64, 4, 4, 4, vocab_size=100, max_chunks=4, max_lone_chunks=6)
    scheduler.ring_up(7, limits)
    sent = frames(scheduler.submit("a", list(range(29)), 5, greedy()))
    assert [len(f.slots[0].tokens) for f in sent] == [4] * 6
    (seventh,) = frames(answer(scheduler, sent[0]))
    assert frames(answer(scheduler, sent[1])) == []  # the prompt's last token: four others are in the ring
    assert frames(answer(scheduler, sent[2])) == []
    (last,) = frames(answer(scheduler, sent[3]))
    assert last.slots[0].is_sampled
    assert frames(scheduler.submit("b", list(range(29)), 5, greedy())) == []
    answers = [frames(answer(scheduler, frame)) for frame in (sent[4], sent[5], seventh)]
    assert [len(more) for more in answers] == [1, 1, 1]
    assert scheduler.num_in_flight == 4


def test_decode_goes_round_until_length() -> None:
    scheduler = up()
    (frame,) = frames(scheduler.submit("a", [3], 3, greedy()))
    seen = []
    for token in (11, 12, 13):
        instructions = answer(scheduler, frame, token)
        (emit,) = [i for i in instructions if isinstance(i, Emit)]
        seen.append((emit.token.id, emit.finish_reason, emit.num_completion))
        sent = frames(instructions)
        frame = sent[0]
    assert seen == [(11, "", 1), (12, "", 2), (13, "length", 3)]
    assert list(frame.closes) == [1]
    assert not frame.slots
    assert scheduler.num_active == 0


def test_stop_token_ends_with_stop() -> None:
    scheduler = up()
    (frame,) = frames(scheduler.submit("a", [3], 3, greedy()))
    (emit,) = [i for i in answer(scheduler, frame, 9) if isinstance(i, Emit)]
    assert emit.finish_reason == "stop"


def test_who_came_first_is_read_first_and_writes_while_the_next_is_read() -> None:
    scheduler = up(max_in_flight=3, max_active=3, chunk=1)
    pending = frames(scheduler.submit("a", list(range(5)), 9, greedy()))
    scheduler.submit("b", list(range(30)), 9, greedy())
    order = []
    for _ in range(14):
        more = frames(answer(scheduler, pending.pop(0)))
        order += [(f.slots[0].session, f.slots[0].is_sampled) for f in more]
        pending += more
    assert [session for session, _ in order[:2]] == [1, 1]  # the rest of its prompt
    first = order.index((1, True))
    assert (2, False) not in order[: first - 1]
    later = order[first:]
    assert later.count((1, True)) >= 4
    assert later.count((2, False)) >= 4


def test_answers_go_before_prompts_but_one_chunk_is_always_on_its_way() -> None:
    scheduler, sent = sharing(2, 6)
    for _ in range(3):
        sent = turn(scheduler, sent)
    waiting = frames(scheduler.submit("long", list(range(40)), 5, greedy()))
    assert not waiting  # both frames are on their way
    kinds = []
    for _ in range(12):
        frame = sent.pop(0)
        sent += frames(answer(scheduler, frame))
        kinds.append(sum(not f.slots[0].is_sampled for f in sent))
    assert set(kinds[1:]) == {1}
    assert scheduler.num_in_flight == 2


def test_queue_then_refusal_then_admission() -> None:
    scheduler = up(max_active=1, queue=1)
    (frame,) = frames(scheduler.submit("a", [3], 1, greedy()))
    assert frames(scheduler.submit("b", [4], 1, greedy())) == []
    (refusal,) = scheduler.submit("c", [5], 1, greedy())
    assert isinstance(refusal, Fail)
    assert refusal.kind is FailureKind.BUSY
    assert "1 requests are running and 1 are waiting" in refusal.message
    after = answer(scheduler, frame)
    assert Start("b") in after
    (sent,) = frames(after)
    assert list(sent.closes) == [1]
    assert sent.opens[0].session == 2


def test_cancel_frees_everywhere_even_with_frames_in_the_ring() -> None:
    scheduler = up()
    sent = frames(scheduler.submit("a", [1, 2, 3], 5, greedy()))
    (close,) = frames(scheduler.cancel("a"))
    assert list(close.closes) == [1]
    assert scheduler.num_active == 0
    assert answer(scheduler, sent[0]) == []
    assert answer(scheduler, sent[1]) == []
    assert scheduler.cancel("a") == []


def test_cancel_of_a_waiting_request_sends_nothing() -> None:
    scheduler = up(max_active=1)
    scheduler.submit("a", [3], 1, greedy())
    scheduler.submit("b", [3], 1, greedy())
    assert scheduler.cancel("b") == []
    assert scheduler.num_queued == 0


def test_one_failed_slot_ends_one_request() -> None:
    scheduler = up()
    (a,) = frames(scheduler.submit("a", [3], 2, greedy()))
    (b,) = frames(scheduler.submit("b", [3], 2, greedy()))
    instructions = answer(scheduler, a, error="layers 0:3 failed")
    (fail,) = [i for i in instructions if isinstance(i, Fail)]
    assert (fail.request_id, fail.kind) == ("a", FailureKind.FAILED)
    assert [i for i in answer(scheduler, b) if isinstance(i, Emit)]


def test_ring_down_ends_all_and_up_starts_clean() -> None:
    scheduler = up(max_active=1)
    (frame,) = frames(scheduler.submit("a", [3], 2, greedy()))
    scheduler.submit("b", [3], 2, greedy())
    failed = scheduler.ring_down("rank 1 is gone")
    assert {f.request_id for f in failed if isinstance(f, Fail)} == {"a", "b"}
    assert all(isinstance(f, Fail) and f.kind is FailureKind.UNAVAILABLE for f in failed)
    (refused,) = scheduler.submit("c", [3], 2, greedy())
    assert isinstance(refused, Fail)
    assert refused.message == "rank 1 is gone"
    scheduler.ring_up(8, Limits(64, 1, 4, 4))
    assert answer(scheduler, frame) == []  # a frame of the old epoch
    (sent,) = frames(scheduler.submit("d", [3], 2, greedy()))
    assert (sent.epoch, list(sent.closes)) == (8, [])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 1, "the prompt is empty"),
        ([1], 0, "max_tokens is 0"),
        ([1] * 60, 5, "the context is 64 tokens, but the prompt has 60 and max_tokens asks for 5 more"),
        ([100], 1, "token id 100 is not in the vocabulary of 100 tokens"),
    ],
)
def test_refusals(prompt: list[int], max_tokens: int, words: str) -> None:
    (fail,) = up().submit("a", prompt, max_tokens, greedy())
    assert isinstance(fail, Fail)
    assert fail.kind is FailureKind.INVALID
    assert words in fail.message


def test_a_running_id_is_refused() -> None:
    scheduler = up()
    scheduler.submit("a", [3], 2, greedy())
    (fail,) = scheduler.submit("a", [3], 2, greedy())
    assert isinstance(fail, Fail)
    assert "already running" in fail.message


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_active is 0"):
        Limits(8, 0, 2)


def test_a_request_that_a_result_leaves_out_ends() -> None:
    scheduler = up()
    (frame,) = frames(scheduler.submit("a", [3], 2, greedy()))
    fail, close = scheduler.on_result(frame.epoch, frame.seq, [])
    assert isinstance(fail, Fail)
    assert "left it out of a frame's result" in fail.message
    assert list(frames([close])[0].closes) == [1]
    assert (scheduler.num_active, scheduler.num_in_flight) == (0, 0)


def test_a_request_whose_token_was_not_drawn_ends() -> None:
    scheduler = up()
    chunk, last = frames(scheduler.submit("a", [3, 4], 2, greedy()))
    assert answer(scheduler, chunk) == []
    fail, _ = scheduler.on_result(last.epoch, last.seq, [ring_pb2.Slot(session=1, position=1)])
    assert isinstance(fail, Fail)
    assert "drew no token" in fail.message


def test_a_result_for_another_session_is_not_taken() -> None:
    scheduler = up()
    (a,) = frames(scheduler.submit("a", [3], 2, greedy()))
    (b,) = frames(scheduler.submit("b", [3], 2, greedy()))
    b_slot = ring_pb2.Slot(session=b.slots[0].session, is_sampled=True, result=ring_pb2.SampledToken(id=5))
    instructions = scheduler.on_result(a.epoch, a.seq, [b_slot])
    assert [i.request_id for i in instructions if isinstance(i, Fail)] == ["a"]
    assert not [i for i in instructions if isinstance(i, Emit)]
    assert [i for i in answer(scheduler, b) if isinstance(i, Emit)]


def test_a_hold_refuses_new_requests_keeps_the_queue_and_lets_running_ones_end() -> None:
    scheduler = up(max_active=1)
    (frame,) = frames(scheduler.submit("a", [3], 1, greedy()))
    scheduler.submit("b", [4], 1, greedy())
    assert scheduler.hold("n1 is short of memory") == []
    (refusal,) = scheduler.submit("c", [5], 1, greedy())
    assert isinstance(refusal, Fail)
    assert (refusal.kind, refusal.message) == (FailureKind.BUSY, "n1 is short of memory")
    after = answer(scheduler, frame)
    assert any(isinstance(i, Emit) for i in after)
    assert Start("b") not in after
    assert scheduler.num_queued == 1
    again = scheduler.hold("")
    assert Start("b") in again
    assert frames(again)[0].opens[0].session == 2


def test_a_long_hold_refuses_the_queue_too() -> None:
    scheduler = up(max_active=1)
    scheduler.submit("a", [3], 1, greedy())
    scheduler.submit("b", [4], 1, greedy())
    scheduler.hold("n1 is short of memory")
    assert scheduler.refuse_queued() == [Fail("b", FailureKind.BUSY, "n1 is short of memory")]
    assert scheduler.num_queued == 0
    assert scheduler.num_active == 1


def sharing(
    max_in_flight: int, num_requests: int, *, max_rows: int = 8
) -> tuple[Scheduler, list[ring_pb2.Frame]]:
    """Requests whose prompts of two tokens have been read, and the frames of their first rows."""
    scheduler = Scheduler(max_queued=9)
    scheduler.ring_up(7, Limits(64, 16, max_in_flight, 4, vocab_size=100, max_rows=max_rows))
    sent = [f for i in range(num_requests) for f in frames(scheduler.submit(str(i), [1, 2], 30, greedy()))]
    while any(not frame.slots[0].is_sampled for frame in sent):
        chunk = next(frame for frame in sent if not frame.slots[0].is_sampled)
        sent.remove(chunk)
        sent += frames(answer(scheduler, chunk))
    return scheduler, sent


def turn(scheduler: Scheduler, sent: list[ring_pb2.Frame], token: int = 5) -> list[ring_pb2.Frame]:
    """Every frame comes back once, in order."""
    return [f for frame in sent for f in frames(answer(scheduler, frame, token))]


def test_rows_are_spread_evenly_over_the_frames() -> None:
    scheduler, sent = sharing(4, 10)
    for _ in range(4):
        sent = turn(scheduler, sent)
    assert sorted(len(frame.slots) for frame in sent) == [1, 3, 3, 3]
    assert {slot.session for frame in sent for slot in frame.slots} == set(range(1, 11))
    assert all(frame.is_batched == (len(frame.slots) > 1) for frame in sent)


def test_no_more_users_than_frames_share_none() -> None:
    scheduler, sent = sharing(4, 4)
    for _ in range(3):
        sent = turn(scheduler, sent)
        assert [len(frame.slots) for frame in sent] == [1, 1, 1, 1]
        assert not any(frame.is_batched for frame in sent)


def test_groups_stay_together_while_nobody_joins_or_leaves() -> None:
    scheduler, sent = sharing(3, 6)
    for _ in range(3):
        sent = turn(scheduler, sent)
    before = [[slot.session for slot in frame.slots] for frame in sent]
    after = [[slot.session for slot in frame.slots] for frame in turn(scheduler, sent)]
    assert after == before


def test_those_who_stay_are_spread_again() -> None:
    scheduler, sent = sharing(2, 8)
    for _ in range(3):
        sent = turn(scheduler, sent)
    assert [len(frame.slots) for frame in sent] == [4, 4]
    for name in ("0", "1", "2"):
        scheduler.cancel(name)
    for _ in range(3):
        sent = turn(scheduler, sent)
    assert sorted(len(frame.slots) for frame in sent) == [2, 3]


def test_the_largest_share_is_kept() -> None:
    scheduler, sent = sharing(2, 10, max_rows=3)
    for _ in range(4):
        sent = turn(scheduler, sent)
        assert all(len(frame.slots) <= 3 for frame in sent)


def test_another_adapter_is_another_frame() -> None:
    scheduler = Scheduler(max_queued=9)
    scheduler.ring_up(7, Limits(64, 16, 2, 4, vocab_size=100, max_rows=8))
    sent = [
        f
        for i in range(6)
        for f in frames(scheduler.submit(str(i), [1, 2], 30, greedy(), "warm" if i % 2 else ""))
    ]
    for _ in range(8):
        sent = turn(scheduler, sent)
    assert all(len({slot.session % 2 for slot in frame.slots}) == 1 for frame in sent)
    assert any(len(frame.slots) > 1 for frame in sent)


def test_a_prompt_goes_in_smaller_chunks_while_answers_are_written() -> None:
    scheduler = Scheduler(max_queued=9)
    scheduler.ring_up(7, Limits(64, 4, 2, 8, vocab_size=100, shared_chunk=3))
    sent = frames(scheduler.submit("short", [1], 3, greedy()))
    sent += frames(scheduler.submit("long", list(range(40)), 1, greedy()))
    sizes = []
    while sent:
        frame = sent.pop(0)
        sizes.append((frame.slots[0].session, len(frame.slots[0].tokens)))
        sent += [f for f in frames(answer(scheduler, frame)) if f.slots]
    last = max(i for i, (session, _) in enumerate(sizes) if session == 1)
    assert {size for _, size in sizes[:last]} == {1, 3}
    assert [size for _, size in sizes[last + 1 :]][-4:] == [8, 8, 6, 1]
    assert sum(size for session, size in sizes if session == 2) == 40


def test_a_chunk_for_company_is_no_larger_than_one_alone() -> None:
    with pytest.raises(ValueError, match="shared_chunk is 9, and must be at most 8"):
        Limits(64, 4, 2, 8, shared_chunk=9)
