"""Whom a prompt waits for, and what becomes of it when that one leaves, fails or is overtaken."""

from __future__ import annotations

import random

import pytest

from cluster.instructions import Fail
from cluster.prompt_waits import MIN_SPARED, find_wait
from cluster.request import PromptWait, Request
from cluster.room import Limits
from cluster.scheduler import Scheduler
from cluster.turns import next_chunk
from shard_loader.reach import Reach
from tests.simulated_stages import SimulatedRing
from tests.test_scheduler import answer, frames, greedy

ALWAYS = 1 << 40  # caches that can be shortened, whatever they hold
SYSTEM = [(7 * i) % 181 for i in range(400)]
CHUNK = 64


def limits(trim_window: int, *, room: int = 64, max_rows: int = 4) -> Limits:
    return Limits(
        *(1000, room, 4, CHUNK),
        max_rows=max_rows,
        vocab_size=200,
        reads_together=True,
        share=lambda num_tokens: num_tokens / 1000,
        trim_window=trim_window,
    )


def request(session: int, prompt: list[int], *, num_sent: int = 0, priority: int = 0) -> Request:
    one = Request(str(session), session, prompt, 10, greedy(), frozenset(), priority=priority)
    one.is_active, one.num_sent, one.is_open = True, num_sent, num_sent > 0
    return one


@pytest.mark.parametrize(
    ("num_sent", "num_common", "trim_window", "expected"),
    [
        (0, 300, ALWAYS, 300),
        (0, 400, ALWAYS, 399),  # all but its last token
        (172, 300, ALWAYS, 300),
        (173, 300, ALWAYS, None),  # it begins at once with what was read
        (0, MIN_SPARED, ALWAYS, MIN_SPARED),
        (0, MIN_SPARED - 1, ALWAYS, None),
        (0, 300, 0, 300),
        (299, 300, 0, 300),  # only a copy at the right place helps
        (300, 300, 0, None),  # too late for one
        (0, 400, 0, 384),  # where it is copied anyhow
        (0, MIN_SPARED - 1, 0, None),
        (0, 300, -1, None),  # nothing can be copied
    ],
)
def test_for_what(num_sent: int, num_common: int, trim_window: int, expected: int | None) -> None:
    other = request(1, SYSTEM, num_sent=num_sent)
    other.points = [384] if trim_window == 0 else []
    mine = request(2, [*SYSTEM[:num_common], *([190] * (400 - num_common))])
    wanted = None if expected is None else PromptWait(1, expected)
    assert find_wait(mine, limits(trim_window), [other, mine]) == wanted
    if trim_window == 0 and expected is not None:
        assert other.points == sorted({384, expected})


@pytest.mark.parametrize("why", ["waits itself", "priority", "adapter", "scored", "begun", "alone"])
def test_not_for_everyone(why: str) -> None:
    other, mine = request(1, SYSTEM), request(2, SYSTEM)
    match why:
        case "waits itself":
            other.wait = PromptWait(7, 300)
        case "priority":
            other.priority = 1
        case "adapter":
            mine.adapter = "warm"
        case "scored":
            mine.sampling.prompt_logprobs = True
        case "begun":
            mine.is_open = True
        case "alone":
            mine.reads_alone = True
    assert find_wait(mine, limits(0), [other, mine]) is None


def test_the_one_that_reads_most_of_it() -> None:
    shorter, longer = request(1, [*SYSTEM[:200], 5, 5]), request(2, [*SYSTEM[:350], 5, 5])
    mine = request(3, SYSTEM)
    assert find_wait(mine, limits(0), [shorter, mine, longer]) == PromptWait(2, 350)


def test_not_for_what_another_one_has_read() -> None:
    """Even where one that has not begun is about to begin with it, too: it may be long until its turn."""
    answering, late = request(1, [*SYSTEM, 5], num_sent=500), request(2, [*SYSTEM, *[6] * 500])
    mine = request(3, [*SYSTEM, *[7] * 50])
    assert find_wait(mine, limits(ALWAYS), [answering, late, mine]) is None
    assert find_wait(mine, limits(ALWAYS), [late, mine]) == PromptWait(2, 400)
    more = request(4, [*SYSTEM, *[7] * 500])
    mine.prompt = [*SYSTEM, *[7] * 200]
    assert find_wait(mine, limits(ALWAYS), [answering, late, mine, more]) == PromptWait(4, 599)


def test_prompts_that_were_read_are_told_by_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the head's lock nobody's long prompt is compared with those of all whose answers are written."""
    writing = [request(n, [*SYSTEM, n], num_sent=len(SYSTEM) + 5) for n in range(1, 50)]
    writing += [request(n, [*SYSTEM[:399], *[n] * 400], num_sent=600) for n in range(51, 100)]
    monkeypatch.setattr("cluster.prompt_waits.common", lambda *_: pytest.fail("compared"))
    assert find_wait(request(100, [*SYSTEM, *SYSTEM]), limits(0), writing) is None


def scheduler_of(trim_window: int, **kwargs: int) -> Scheduler:
    scheduler = Scheduler(max_queued=100)
    scheduler.ring_up(1, limits(trim_window, **kwargs))
    return scheduler


@pytest.mark.parametrize("trim_window", [0, ALWAYS])
def test_those_behind_go_on_when_the_first_one_leaves(trim_window: int) -> None:
    scheduler = scheduler_of(trim_window)
    pending = frames(scheduler.submit("a", SYSTEM, 3, greedy()))
    for name in "bc":
        assert not frames(scheduler.submit(name, SYSTEM, 3, greedy()))  # they wait for the first one
    pending += frames(scheduler.cancel("a"))
    opened = list[tuple[int, int]]()
    while pending:
        frame = pending.pop(0)
        opened += [(spec.session, spec.from_tokens) for spec in frame.opens]
        if frame.slots:
            pending += frames(answer(scheduler, frame, 150))
    assert [session for session, _ in opened][:1] == [1]
    assert len(opened) == 3
    assert scheduler.num_active == 0
    # The second one reads all that could not be begun with, and the third one begins with that.
    assert opened[2][1] >= 384


def test_those_behind_begin_anew_where_the_first_one_fails() -> None:
    scheduler = scheduler_of(0)
    pending = frames(scheduler.submit("a", SYSTEM, 3, greedy()))
    pending += frames(scheduler.submit("b", SYSTEM, 3, greedy()))
    failed, ended = set[str](), 0
    while pending:
        frame = pending.pop(0)
        if not frame.slots:
            continue
        is_copied = any(fork.from_session == 1 for fork in frame.forks)
        is_lost = any(spec.from_session for spec in frame.opens)
        after = answer(scheduler, frame, 150, error="it broke" if is_copied or is_lost else "")
        failed |= {one.request_id for one in after if isinstance(one, Fail)}
        pending += frames(after)
        ended += 1
    assert failed == {"a"}
    assert scheduler.num_active == 0


def test_short_prompts_do_not_keep_one_back_that_waits_for_a_long_one() -> None:
    """The one that reads has its turns as if it were as short as the one that waits."""
    long, waiting = request(2, [*SYSTEM, *[3] * 500], num_sent=64), request(3, [*SYSTEM[:200], 5])
    first, short = request(1, [6] * 900, num_sent=64), request(4, [7] * 170)
    active = [first, long, waiting, short]
    assert next_chunk(active, 1) is short
    waiting.wait = find_wait(waiting, limits(0), active)
    assert waiting.wait == PromptWait(2, 200)
    assert next_chunk(active, 1) is long
    assert next_chunk(active, 0) is first
    long.num_sent = 16
    assert next_chunk(active, 1) is short


@pytest.mark.parametrize("trim_window", [0, 150, ALWAYS])
@pytest.mark.parametrize("seed", range(8))
def test_crowds_with_common_beginnings_get_their_answers(seed: int, trim_window: int) -> None:
    """Each frame asks of the simulated caches what they can do; every answer is its own language's."""
    draws = random.Random(seed)
    room = draws.choice((1, 3, 64))
    scheduler = scheduler_of(trim_window, room=room, max_rows=draws.choice((1, 4)))
    ring = SimulatedRing(
        scheduler, lambda tokens: (sum(tokens) * 31 + len(tokens)) % 181, Reach.NONE, trim_window
    )
    bases = [[draws.randrange(181) for _ in range(draws.randrange(20, 400))] for _ in range(3)]
    prompts = dict[str, list[int]]()
    gone = set[str]()
    num_tokens = 0
    while len(prompts) < 40 or ring.frames:
        if len(prompts) < 40 and (draws.random() < 0.5 or not ring.frames):
            base, name = draws.choice(bases), str(len(prompts))
            tail = [draws.randrange(181) for _ in range(draws.choice((0, 1, 30, 200)))]
            prompts[name] = [*base[: draws.choice((len(base), draws.randrange(1, len(base))))], *tail]
            num_tokens += len(prompts[name])
            ring.take(
                scheduler.submit(
                    name, prompts[name], draws.randrange(1, 6), greedy(), priority=draws.choice((0, 0, 1))
                )
            )
        elif draws.random() < 0.03 and prompts:
            name = draws.choice(list(prompts))
            gone.add(name)
            ring.take(scheduler.cancel(name))
        elif ring.frames:
            ring.step()
    assert scheduler.num_active == scheduler.num_queued == 0
    assert prompts.keys() - gone <= ring.finished.keys()
    for name in ring.finished:
        tokens = list(prompts[name])
        for token in ring.answers[name]:
            assert token == ring.language(tokens)
            tokens.append(token)
    assert room < 64 or scheduler.counters.num_cached_tokens > num_tokens / 5


def test_one_that_was_to_begin_with_a_copy_which_goes_for_others_reads_all() -> None:
    """The copy was on its way when it was found, and its room is needed before the request's turn comes."""
    scheduler = scheduler_of(300, room=1, max_rows=1)
    ring = SimulatedRing(scheduler, lambda tokens: (sum(tokens) * 31 + len(tokens)) % 181, Reach.NONE, 300)
    ring.take(scheduler.submit("long", SYSTEM[:250], 150, greedy()))
    assert ring.frames[-1].forks
    ring.take(scheduler.submit("late", [*SYSTEM[:20], *[190] * 20], 3, greedy(), priority=1))
    assert scheduler.counters.num_cached_tokens == 20
    ring.take(scheduler.submit("wide", [3] * 500, 30, greedy()))
    ring.run()
    assert ring.finished.keys() == {"long", "late", "wide"}
    assert scheduler.counters.num_cached_tokens == 0
