"""The scheduler's guesses on simulated rings: what comes out, and that no stage is asked too much."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from shard_loader.reach import Reach
from tests.simulated_stages import Language, SimulatedRing

ALWAYS = 1 << 40
REACHES = [(Reach.ANY, ALWAYS), (Reach.PASS, 40), (Reach.PASS, 5), (Reach.MARK, 0), (Reach.NONE, 0)]


def repeating(period: int) -> Language:
    """A language that says the same again and again."""
    return lambda tokens: 10 + len(tokens) % period


def capricious(seed: int) -> Language:
    """One that repeats what it said before, but for a token in every five."""

    def say(tokens: Sequence[int]) -> int:
        chance = random.Random(hash((seed, tuple(tokens[-4:]))))
        return chance.randrange(10, 13) if chance.random() < 0.2 else 10 + (tokens[-1] * 7 + 1) % 5

    return say


def ring(
    language: Language,
    reach: Reach = Reach.ANY,
    trim_window: int = ALWAYS,
    *,
    frames: int = 4,
    drafts: int = 6,
    room: int = 6,
) -> SimulatedRing:
    scheduler = Scheduler(max_queued=64)
    limits = Limits(
        *(400, room, frames, 16),
        max_rows=4,
        vocab_size=100,
        share=lambda n: n / 400,
        trim_window=trim_window,
        reach=reach,
        max_drafts=6,
    )
    scheduler.ring_up(1, limits)
    return SimulatedRing(scheduler, language, reach, trim_window)


def expected(language: Language, prompt: Sequence[int], max_tokens: int, stop: int = -1) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(language(tokens))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("reach", "trim_window"), REACHES)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_answers_are_those_without_guesses(reach: Reach, trim_window: int, frames: int) -> None:
    """Requests come and go at random; stop ids, lengths and cancels cut answers in the middle of guesses."""
    for seed in range(40):
        draws = random.Random(seed)
        language = capricious(seed) if seed % 2 else repeating(draws.randrange(1, 7))
        simulated = ring(language, reach, trim_window, frames=frames)
        simulated.token_ms = draws.choice([0.02, 0.1, 0.4])
        wanted: dict[str, list[int]] = {}
        turns: list[list[int]] = []
        for number in range(draws.randrange(1, 9)):
            name = f"r{number}"
            prompt = [draws.randrange(10, 15) for _ in range(draws.randrange(1, 40))]
            if turns and draws.random() < 0.5:  # a chat's next turn
                prompt = [*draws.choice(turns), *prompt][:150]
            max_tokens, stop = draws.randrange(1, 60), draws.choice([-1, 11, 99])
            sampling = ring_pb2.Sampling(stop_ids=[] if stop < 0 else [stop])
            wanted[name] = expected(language, prompt, max_tokens, stop)
            turns.append([*prompt, *wanted[name]][: draws.choice([-1, -3, 1000])])
            simulated.take(simulated.scheduler.submit(name, prompt, max_tokens, sampling))
            for _ in range(draws.randrange(30)):
                if simulated.frames:
                    simulated.step()
            if draws.random() < 0.2 and name not in simulated.finished:
                simulated.take(simulated.scheduler.cancel(name))
                got = simulated.answers.get(name, [])
                assert got == wanted.pop(name)[: len(got)]
        simulated.run()
        for name, answer in wanted.items():
            assert simulated.answers[name] == answer
        assert simulated.scheduler.num_active == simulated.scheduler.num_in_flight == 0
        kept = simulated.scheduler.num_kept
        simulated.take(simulated.scheduler.hold("no more"))
        simulated.run()
        assert simulated.caches == {}, f"{kept} were kept, and these are left"


def test_a_text_that_repeats_itself_takes_few_trips() -> None:
    simulated = ring(repeating(5))
    simulated.take(simulated.scheduler.submit("a", list(range(10, 15)) * 4, 100, ring_pb2.Sampling()))
    simulated.run()
    assert len(simulated.answers["a"]) == 100
    assert simulated.num_trips < 30
    assert simulated.most_in_flight == 4  # guesses went ahead of the verdicts
    speculation = simulated.scheduler.speculation
    assert speculation.num_right > 0.9 * speculation.num_guessed > 50


def test_where_several_tokens_take_as_long_as_several_frames_single_guesses_fill_the_ring() -> None:
    simulated = ring(repeating(5))
    simulated.token_ms = 1.0
    simulated.take(simulated.scheduler.submit("a", list(range(10, 15)) * 4, 100, ring_pb2.Sampling()))
    lengths = []
    while simulated.frames:
        lengths += [len(slot.tokens) for slot in simulated.frames[0].slots if slot.is_sampled]
        simulated.step()
    assert simulated.answers["a"] == expected(repeating(5), list(range(10, 15)) * 4, 100)
    assert lengths.count(1) > 0.8 * len(lengths)
    assert simulated.most_in_flight == 4


def test_a_text_without_repetition_is_not_guessed() -> None:
    simulated = ring(lambda tokens: (tokens[-1] * 31 + len(tokens)) % 97)
    simulated.take(simulated.scheduler.submit("a", list(range(50, 90)), 60, ring_pb2.Sampling()))
    simulated.run()
    assert simulated.num_trips <= 60 + 4
    assert simulated.scheduler.speculation.num_guessed < 6


def test_whoever_asks_for_log_probabilities_gets_them_token_by_token() -> None:
    simulated = ring(repeating(3))
    simulated.take(simulated.scheduler.submit("a", [10, 11, 12] * 4, 50, ring_pb2.Sampling(logprobs=True)))
    simulated.run()
    assert simulated.scheduler.speculation.num_guessed == 0
    assert simulated.num_trips == 51


def test_with_more_users_than_frames_nobody_waits_for_a_guess() -> None:
    simulated = ring(repeating(4), frames=2)
    for name in "abc":
        simulated.take(simulated.scheduler.submit(name, [10, 11, 12, 13] * 3, 40, ring_pb2.Sampling()))
    while len(simulated.finished) == 0:
        if simulated.scheduler.num_active == 3:
            assert all(slot.num_draws <= 1 for slot in simulated.frames[-1].slots)
        simulated.step()
    simulated.run()
    assert all(len(answer) == 40 for answer in simulated.answers.values())


def test_who_waits_for_the_room_of_one_that_ends_begins_with_it_without_its_guesses() -> None:
    """One frame keeps the one that ended, opens the other as its copy, and closes it."""
    simulated = ring(repeating(5), Reach.MARK, 0, frames=1, room=1)
    prompt, other = list(range(10, 15)) * 4, [*list(range(10, 15)) * 3, 10, 11, 12, 13, 50, 51]
    simulated.take(simulated.scheduler.submit("times", list(range(50, 70)), 100, ring_pb2.Sampling()))
    simulated.run()
    simulated.take(simulated.scheduler.submit("first", prompt, 380, ring_pb2.Sampling(stop_ids=[12])))
    simulated.take(simulated.scheduler.submit("second", other, 20, ring_pb2.Sampling()))
    assert simulated.scheduler.num_queued == 1
    while "first" not in simulated.finished:
        simulated.step()
    frame = simulated.frames[0]
    source = frame.opens[0].from_session
    assert (frame.opens[0].from_tokens, list(frame.closes)) == (19, [source])
    assert len(simulated.caches[source].tokens) > 19  # guesses that were void
    assert (list(frame.keeps), list(frame.keep_tokens)) == ([source], [19])
    simulated.run()
    assert simulated.answers["second"] == expected(repeating(5), other, 20)


def test_a_stage_that_draws_behind_a_wrong_guess_is_not_believed() -> None:
    simulated = ring(repeating(5))
    simulated.take(simulated.scheduler.submit("a", list(range(10, 15)) * 4, 100, ring_pb2.Sampling()))
    while not simulated.frames[0].slots[0].num_draws > 1:
        simulated.step()
    frame = simulated.frames[0]
    slot = ring_pb2.Slot(session=1, is_sampled=True, result=ring_pb2.SampledToken(id=99))
    slot.more.add(id=98)
    with pytest.raises(AssertionError, match="the last stage drew tokens behind a wrong guess"):
        simulated.take(simulated.scheduler.on_result(1, frame.seq, [slot]))
