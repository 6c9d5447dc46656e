from __future__ import annotations

import random

import pytest

from cluster.instructions import Fail
from cluster.kept import MIN_COMMON, Kept, KeptSessions, common
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from tests.test_scheduler import answer, frames, greedy

ALWAYS = 1 << 40
PROMPT = list(range(1, 31))


def keeping(
    *, max_active: int = 1, trim_window: int = ALWAYS, context: int = 100, max_rows: int = 1
) -> Scheduler:
    """Room for so many whole contexts, of which a session takes as many hundredths as it has tokens."""
    scheduler = Scheduler(max_queued=4)
    limits = Limits(
        *(context, max_active, 4, 64),
        max_rows=max_rows,
        vocab_size=200,
        share=lambda n: n / context,
        trim_window=trim_window,
    )
    scheduler.ring_up(7, limits)
    return scheduler


def run(scheduler: Scheduler, name: str, prompt: list[int], writes: int = 3) -> list[ring_pb2.Frame]:
    """All frames of a request that writes 51, 52, ... until it has its length."""
    seen: list[ring_pb2.Frame] = []
    waiting = frames(scheduler.submit(name, prompt, writes, greedy()))
    token = 50
    while waiting:
        frame = waiting.pop(0)
        seen.append(frame)
        if frame.slots:
            token += frame.slots[0].is_sampled
            waiting += frames(answer(scheduler, frame, token))
    return seen


def test_how_much_two_prompts_have_in_common() -> None:
    draws = random.Random(3)
    for _ in range(300):
        a = [draws.randrange(3) for _ in range(draws.randrange(20))]
        b = [*a[: draws.randrange(21)], *(draws.randrange(3) for _ in range(draws.randrange(9)))]
        limit = draws.randrange(25)
        expected = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        assert common(a, b, limit) == min(expected, limit)


def test_the_longest_common_beginning_is_taken() -> None:
    kept = KeptSessions()
    kept.add(Kept(1, PROMPT[:20], "", 0.2))
    kept.add(Kept(2, [*PROMPT[:25], 99], "", 0.2))
    kept.add(Kept(3, PROMPT, "warm", 0.2))
    match = kept.match(PROMPT, "", ALWAYS)
    assert match is not None
    assert (match[0].session, match[1]) == (2, 25)
    assert [old.session for old in kept.oldest()] == [1, 3, 2]
    whole = kept.match(PROMPT, "", 0)  # a cache that cannot be shortened
    assert whole is not None
    assert (whole[0].session, whole[1]) == (1, 20)
    assert kept.match([7, *PROMPT], "", ALWAYS) is None
    assert kept.match(PROMPT[: MIN_COMMON - 1], "", ALWAYS) is None


def test_a_second_turn_reads_only_what_is_new() -> None:
    scheduler = keeping()
    first = run(scheduler, "a", PROMPT)
    assert list(first[-1].keeps) == [1]
    assert not first[-1].closes
    turn = [*PROMPT, 51, 52, 53, 7, 8, 9]
    second = run(scheduler, "b", turn)
    spec = second[0].opens[0]
    assert (spec.from_session, spec.from_tokens, spec.prompt_tokens) == (1, len(PROMPT) + 2, len(turn))
    assert list(second[0].closes) == [1]  # it goes on as the new one
    assert (second[0].slots[0].position, list(second[0].slots[0].tokens)) == (32, [53, 7, 8])
    assert scheduler.num_kept == 1
    assert scheduler.counters.num_cached_tokens == 32
    assert scheduler.counters.num_prompt_tokens == len(PROMPT) + len(turn)


def test_the_same_prompt_again_reads_its_last_token_only() -> None:
    scheduler = keeping(max_active=4)
    run(scheduler, "a", PROMPT)
    again = run(scheduler, "b", PROMPT)
    assert again[0].opens[0].from_tokens == len(PROMPT) - 1
    assert list(again[0].slots[0].tokens) == PROMPT[-1:]
    assert again[0].slots[0].is_sampled
    assert not again[0].closes
    assert scheduler.num_kept == 2


def test_what_cannot_be_shortened_is_read_again() -> None:
    scheduler = keeping(trim_window=0, max_active=4)
    run(scheduler, "a", PROMPT)
    assert not run(scheduler, "b", PROMPT)[0].opens[0].from_session
    assert run(scheduler, "c", [*PROMPT, 51, 52, 9])[0].opens[0].from_tokens == 32


def test_a_new_request_takes_the_room_of_what_is_kept() -> None:
    scheduler = keeping()
    run(scheduler, "a", PROMPT)
    other = run(scheduler, "b", [90, *range(60)], 30)
    assert list(other[0].closes) == [1]
    assert not other[0].opens[0].from_session
    assert scheduler.num_kept == 1


def test_the_least_recently_used_goes_first() -> None:
    scheduler = keeping(max_active=1)
    for name, start in (("a", 0), ("b", 60), ("c", 100)):
        run(scheduler, name, list(range(start, start + 30)))
    assert scheduler.num_kept == 3
    fourth = run(scheduler, "d", list(range(20)), 1)
    assert fourth[0].opens[0].from_session == 1
    assert list(fourth[0].closes) == [2]


def test_an_heir_closes_its_source_when_there_is_no_room_for_both() -> None:
    scheduler = keeping(max_active=1)
    run(scheduler, "a", PROMPT, 60)
    long = run(scheduler, "b", [*PROMPT[:28], 150, 151], 60)
    assert long[0].opens[0].from_session == 1
    assert list(long[0].closes) == [1]
    assert sum(list(frame.closes).count(1) for frame in long) == 1


def waiting(scheduler: Scheduler, *prompts: list[int]) -> list[ring_pb2.Frame]:
    """Admitted requests that cannot begin: a long prompt has the only frame. What has been sent so far."""
    sent = frames(scheduler.submit("first", [150, *range(90)], 1, greedy()))
    assert len(sent) == 1
    for name, prompt in enumerate(prompts):
        assert not [f for f in frames(scheduler.submit(str(name), prompt, 5, greedy())) if f.slots]
    return sent


def narrow(room: int) -> Scheduler:
    """One frame in flight, and a session of PROMPT that is kept."""
    scheduler = Scheduler(max_queued=4)
    limits = Limits(100, room, 1, 64, vocab_size=200, share=lambda n: n / 100, trim_window=ALWAYS)
    scheduler.ring_up(7, limits)
    run(scheduler, "a", PROMPT)
    return scheduler


def follow(scheduler: Scheduler, pending: list[ring_pb2.Frame]) -> list[ring_pb2.Frame]:
    """All frames until nothing is left to do."""
    seen = []
    while pending:
        seen.append(pending.pop(0))
        pending += frames(answer(scheduler, seen[-1], 50))
    return seen


def test_what_two_wait_to_begin_with_is_closed_after_the_second() -> None:
    scheduler = narrow(3)
    pending = waiting(scheduler, [*PROMPT[:28], 150], [*PROMPT[:28], 151])
    pending += frames(scheduler.hold("memory is short"))  # nothing is kept any more
    seen = follow(scheduler, pending)
    begun = [frame for frame in seen if frame.opens and frame.opens[0].from_session == 1]
    assert [list(frame.closes).count(1) for frame in begun] == [0, 1]
    assert sum(list(frame.closes).count(1) for frame in seen) == 1


def test_what_one_waits_to_begin_with_does_not_keep_the_room_of_one_that_begins() -> None:
    """One goes on where a kept one ended, and a short one waits for its copy: all three had no room."""
    scheduler = Scheduler(max_queued=4)
    limits = Limits(100, 1, 1, 32, vocab_size=200, share=lambda n: n / 100, trim_window=ALWAYS)
    scheduler.ring_up(7, limits)
    run(scheduler, "a", [*range(60)])
    pending = frames(scheduler.submit("first", [150, 151], 1, greedy()))
    scheduler.submit("short", [*range(16), 150, 151, 152], 1, greedy())
    pending += frames(scheduler.submit("heir", [*range(60), 51, 52, 53], 5, greedy()))
    held: dict[int, int] = {1: 62}  # tokens, by session
    begun = {}
    while pending:
        frame = pending.pop(0)
        begun |= {spec.prompt_tokens: (spec.from_session, spec.from_tokens) for spec in frame.opens}
        for number in frame.closes:
            del held[number]
        held |= {slot.session: slot.position + len(slot.tokens) for slot in frame.slots}
        assert sum(held.values()) <= 100
        pending += frames(answer(scheduler, frame, 50)) if frame.slots else []
    assert begun == {2: (0, 0), 63: (1, 62), 19: (4, 16)}  # the short one begins with the heir instead
    assert scheduler.counters.num_cached_tokens == 62 + 16
    assert not scheduler.requests


def test_what_a_request_waited_to_begin_with_is_closed_when_it_is_cancelled() -> None:
    scheduler = narrow(3)
    pending = waiting(scheduler, [*PROMPT, 51, 52, 53])  # goes on where the kept one ended
    assert scheduler.num_kept == 0
    cancelled = frames(scheduler.cancel("0"))
    assert [list(frame.closes) for frame in cancelled] == [[1]]
    assert not any(frame.opens for frame in follow(scheduler, pending)[1:])


def test_nothing_is_kept_while_memory_is_short() -> None:
    scheduler = keeping(max_active=4)
    run(scheduler, "a", PROMPT)
    held = frames(scheduler.hold("memory is short"))
    assert [list(frame.closes) for frame in held] == [[1]]
    assert scheduler.num_kept == 0


@pytest.mark.parametrize("max_rows", [1, 8])
def test_small_sessions_are_more_than_whole_contexts(max_rows: int) -> None:
    scheduler = keeping(max_active=2, max_rows=max_rows)
    for i in range(10):
        scheduler.submit(str(i), [i, 1], 8, greedy())
    assert scheduler.num_active == 10
    scheduler.submit("large", list(range(20)), 70, greedy())  # it is not padded to, nor are they
    assert (scheduler.num_active, scheduler.num_queued) == (11, 0)
    scheduler.submit("larger", list(range(20)), 75, greedy())
    assert (scheduler.num_active, scheduler.num_queued) == (11, 1)


def test_a_cancelled_prompt_is_kept_as_far_as_it_went_in() -> None:
    scheduler = keeping(max_active=4)
    sent = frames(scheduler.submit("a", PROMPT, 9, greedy()))
    gone = frames(scheduler.cancel("a"))
    for frame in sent:
        answer(scheduler, frame)
    assert [list(frame.keeps) for frame in gone] == [[1]]
    again = frames(scheduler.submit("b", PROMPT, 9, greedy()))
    assert again[0].opens[0].from_tokens == len(PROMPT) - 1


def test_what_a_failed_frame_was_of_is_kept_no_more() -> None:
    """Its request was cancelled before the stage's error came: nobody may begin with what is not there."""
    scheduler = keeping(max_active=4)
    (first, *_) = frames(scheduler.submit("a", PROMPT, 9, greedy()))
    scheduler.cancel("a")
    waiting = frames(scheduler.submit("b", PROMPT, 9, greedy()))
    assert not waiting[0].opens[0].from_session  # a frame of the first is still in the ring
    after = frames(answer(scheduler, first, error="it broke"))
    assert [list(frame.closes) for frame in after] == [[1]]
    assert scheduler.num_kept == 0


def test_an_answer_that_failed_is_not_kept() -> None:
    scheduler = keeping(max_active=4)
    sent = frames(scheduler.submit("a", PROMPT, 9, greedy()))
    after = [f for frame in sent[:1] for f in frames(answer(scheduler, frame, error="it broke"))]
    assert [list(frame.closes) for frame in after] == [[1]]
    assert scheduler.num_kept == 0


def beside(scheduler: Scheduler, prompt: list[int]) -> tuple[ring_pb2.Frame, ring_pb2.Frame]:
    """One request has sent its whole prompt and writes; the first frame of another with `prompt`."""
    first, last = frames(scheduler.submit("a", PROMPT, 9, greedy()))
    assert (first.opens[0].session, last.slots[0].is_sampled) == (1, True)
    (second, *_) = frames(scheduler.submit("b", prompt, 9, greedy()))
    return first, second


def test_a_prompt_begins_with_what_one_that_runs_has_read() -> None:
    scheduler = keeping(max_active=4)
    _, second = beside(scheduler, [*PROMPT[:20], 150, 151, 152])
    spec = second.opens[0]
    assert (spec.from_session, spec.from_tokens, spec.prompt_tokens) == (1, 20, 23)
    assert (second.slots[0].position, list(second.slots[0].tokens)) == (20, [150, 151])
    assert not second.closes  # the other goes on
    counters = scheduler.counters
    assert (counters.num_cached_prompts, counters.num_cached_tokens) == (1, 20)


@pytest.mark.parametrize("why", ["short", "window", "off", "adapter", "scored"])
def test_not_every_prompt_begins_with_what_another_reads(why: str) -> None:
    scheduler = keeping(max_active=4, trim_window={"window": 39, "off": -1}.get(why, ALWAYS))
    scheduler.submit("a", PROMPT, 9, greedy())
    sampling = greedy()
    sampling.prompt_logprobs = why == "scored"
    prompt = [*PROMPT[: MIN_COMMON - 1], 150] if why == "short" else PROMPT
    adapter = "warm" if why == "adapter" else ""
    (second, *_) = frames(scheduler.submit("b", prompt, 9, sampling, adapter))
    assert (second.opens[0].from_session, second.slots[0].position) == (0, 0)


def test_who_began_with_one_that_failed_reads_all_itself() -> None:
    """Once: after that an error is its own."""
    scheduler = keeping(max_active=4)
    first, second = beside(scheduler, PROMPT)
    assert second.opens[0].from_session == 1
    failed = answer(scheduler, first, error="it broke")
    assert [i.request_id for i in failed if isinstance(i, Fail)] == ["a"]
    after = answer(scheduler, second, error="session 1 is not open on this stage, and has no copy")
    assert not any(isinstance(i, Fail) for i in after)
    (again, *_) = [frame for frame in frames(after) if frame.opens]
    spec = again.opens[0]
    assert (spec.session, spec.from_session, again.slots[0].position) == (3, 0, 0)
    assert 2 in again.closes
    assert (scheduler.counters.num_cached_prompts, scheduler.counters.num_cached_tokens) == (0, 0)
    over = [i for i in answer(scheduler, again, error="no memory") if isinstance(i, Fail)]
    assert [(fail.request_id, fail.message) for fail in over] == [("b", "no memory")]
