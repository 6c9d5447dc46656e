"""When the scheduler has a copy of a prompt's beginning made, and what goes for it."""

from __future__ import annotations

from cluster.instructions import Fail
from cluster.prompt_points import END_TOKENS
from proto import ring_pb2
from tests.test_kept import ALWAYS, PROMPT, follow, keeping, run
from tests.test_scheduler import answer, frames, greedy

LONG = list(range(1, 61))
END = len(LONG) - END_TOKENS


def forks(seen: list[ring_pb2.Frame]) -> list[tuple[int, int, int]]:
    """Of each copy: its number, whose it is, and of how many tokens."""
    return [
        (fork.session, fork.from_session, slot.position + len(slot.tokens))
        for frame in seen
        for fork, slot in zip(frame.forks, frame.slots, strict=False)
    ]


def test_a_copy_is_made_with_the_chunk_that_ends_there() -> None:
    scheduler = keeping(max_active=4, trim_window=0)
    seen = run(scheduler, "a", LONG)
    assert forks(seen) == [(2, 1, END)]
    assert scheduler.num_kept == 2
    turn = [*LONG[:-2], 150, 151, *range(100, 130)]
    second = run(scheduler, "b", turn)
    spec = second[0].opens[0]
    assert (spec.session, spec.from_session, spec.from_tokens) == (3, 2, END)
    assert not any(frame.closes for frame in second)  # a copy stays for others
    assert forks(second) == [(4, 3, len(turn) - END_TOKENS)]


def test_caches_that_can_be_shortened_need_no_copies() -> None:
    scheduler = keeping(max_active=4, trim_window=ALWAYS)
    assert not forks(run(scheduler, "a", LONG))


def test_a_session_that_stays_below_the_window_needs_no_copy() -> None:
    scheduler = keeping(max_active=4, trim_window=70)
    assert not forks(run(scheduler, "a", LONG, 9))
    assert forks(run(scheduler, "b", [0, *LONG], 9))


def test_a_point_of_which_there_is_a_copy_gets_no_other() -> None:
    scheduler = keeping(max_active=4, trim_window=0)
    pending = frames(scheduler.submit("a", LONG, 3, greedy()))
    pending += frames(scheduler.submit("b", LONG, 3, greedy()))
    assert forks(follow(scheduler, pending)) == [(2, 1, END)]


def test_older_ones_go_for_a_copy_and_without_room_there_is_none() -> None:
    scheduler = keeping(max_active=1, trim_window=0)  # 100 tokens in all
    run(scheduler, "old", [180, *range(22)], 1)  # too short for a copy
    assert scheduler.num_kept == 1
    short = run(scheduler, "a", LONG[:50], 1)
    (copied,) = [frame for frame in short if frame.forks]
    assert list(copied.closes) == [1]
    assert not forks(run(scheduler, "b", [190, *range(70)], 1))


def test_what_runs_takes_the_room_of_copies_as_it_grows() -> None:
    """All of the context is reserved, but a copy stays until the answer needs its room."""
    scheduler = keeping(max_active=1, trim_window=0, context=1000)
    prompt = [n % 200 for n in range(400)]
    pending = frames(scheduler.submit("a", prompt, 600, greedy()))
    seen, num_drawn = [], 0
    while pending and not any(frame.closes for frame in seen):
        seen.append(pending.pop(0))
        num_drawn += sum(slot.is_sampled for slot in seen[-1].slots)
        pending += frames(answer(scheduler, seen[-1], 50))
    assert forks(seen) == [(2, 1, 384)]
    assert list(seen[-1].closes) == [2]
    assert 400 + num_drawn + 384 < 1000 + 5
    assert num_drawn > 100


def test_a_copy_that_failed_is_forgotten_and_who_began_with_it_begins_anew() -> None:
    scheduler = keeping(max_active=4, trim_window=0)
    sent = frames(scheduler.submit("a", LONG, 3, greedy()))
    (copied,) = [frame for frame in sent if frame.forks]
    (second, *_) = frames(scheduler.submit("b", LONG, 3, greedy()))
    assert [(spec.from_session, spec.from_tokens) for spec in second.opens] == [(2, END)]  # read before it
    after = answer(scheduler, copied, error="it broke")
    assert [fail.request_id for fail in after if isinstance(fail, Fail)] == ["a"]
    assert 2 in [session for frame in frames(after) for session in frame.closes]
    assert scheduler.num_kept == 0
    after = answer(scheduler, second, error="session 2 is not open on this stage, and has no copy")
    assert not any(isinstance(one, Fail) for one in after)
    (again,) = [frame for frame in frames(after) if frame.opens]
    assert (again.opens[0].from_session, again.slots[0].position) == (0, 0)
    assert scheduler.counters.num_cached_tokens == 0


def test_no_copies_are_made_while_memory_is_short() -> None:
    scheduler = keeping(max_active=4, trim_window=0)
    pending = frames(scheduler.submit("a", [n % 200 for n in range(90)], 5, greedy()))
    pending += frames(scheduler.hold("memory is short"))
    seen = follow(scheduler, pending)
    made, closed = forks(seen), [session for frame in seen for session in frame.closes]
    assert scheduler.num_kept == 0
    assert all(session in closed for session, _, _ in made)


def test_how_often_is_counted() -> None:
    scheduler = keeping(max_active=4)
    for name in "abc":
        run(scheduler, name, PROMPT)
    counters = scheduler.counters
    assert (counters.num_prompts, counters.num_cached_prompts) == (3, 2)
