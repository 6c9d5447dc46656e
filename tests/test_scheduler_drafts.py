"""The scheduler and a draft model, on simulated rings: what is asked, what waits, and what comes out."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.draft_pay import FIRST_PAUSE_TOKENS, NUM_LEAST
from cluster.foretold import Drafted, Foretold
from cluster.instructions import Draft, EndDrafts, Instruction
from cluster.room import Limits
from cluster.scheduler import Scheduler
from proto import ring_pb2
from shard_loader.reach import Reach
from tests.simulated_stages import Language, SimulatedRing

ALWAYS = 1 << 40


class DraftedRing(SimulatedRing):
    """A simulated ring with a draft model that knows the language, but for some tokens.

    wrong: of its guesses. short: of its windows, that end early. prompt: it answers before the next frame
    comes back; else as chance will have it. What was asked before is dropped, as the real one drops it.
    """

    def __init__(
        self,
        language: Language,
        *,
        seed: int = 0,
        wrong: float = 0.0,
        short: float = 0.0,
        reach: Reach = Reach.ANY,
        frames: int = 4,
        has_ngrams: bool = False,
        drafts_ahead: bool = True,
        prompt: bool = True,
    ) -> None:
        scheduler = Scheduler(max_queued=64)
        trim_window = ALWAYS if reach == Reach.ANY else 0
        limits = Limits(
            *(400, 6, frames, 16),
            max_rows=4,
            vocab_size=10**9,
            share=lambda n: n / 400,
            trim_window=trim_window,
            reach=reach,
            max_drafts=6,
            has_ngrams=has_ngrams,
            has_drafter=True,
            drafts_ahead=drafts_ahead,
        )
        scheduler.ring_up(1, limits)
        super().__init__(scheduler, language, reach, trim_window)
        self.draws, self.wrong, self.short, self.is_prompt = random.Random(seed), wrong, short, prompt
        self.asked: deque[Draft] = deque()
        self.calls: list[Draft] = []
        self.ended: list[int] = []
        self.rested: list[int] = []
        self.wrong_at: Callable[[int], bool] = lambda position: False
        self.draft_ms, self.num_passes = (
            0.05,
            0,
        )  # of the draft model: its time for a pass, where a trip takes 1
        self.num_read: dict[int, int] = {}  # tokens, by session

    def take(self, instructions: Sequence[Instruction]) -> None:
        for one in instructions:
            if isinstance(one, Draft):
                self.asked = deque(older for older in self.asked if older.session != one.session)
                self.asked.append(one)
                self.calls.append(one)
            elif isinstance(one, EndDrafts):
                self.asked = deque(older for older in self.asked if older.session != one.session)
                (self.ended if one.is_over else self.rested).append(one.session)
        super().take(instructions)

    def run(self) -> None:
        while self.frames or self.asked:
            if self.asked and (not self.frames or self.is_prompt or self.draws.random() < 0.5):
                self._answer(self.asked.popleft())
            else:
                self.step()

    def _answer(self, call: Draft) -> None:
        tokens = list(call.tokens)
        for _ in range(call.num_drafts):
            if self.draws.random() < self.short:
                break
            is_wrong = self.wrong_at(len(tokens)) or self.draws.random() < self.wrong
            tokens.append(self.language(tokens) + is_wrong)
        guesses = tokens[len(call.tokens) :]
        num_read = len(call.tokens) - self.num_read.get(call.session, 0)
        self.num_read[call.session] = len(call.tokens)
        num_passes = num_read // 128 + len(guesses) + (len(guesses) < call.num_drafts)
        self.num_passes += num_passes
        own_ms = max(num_passes * self.draft_ms, 1e-6)
        drafted = Drafted(len(call.tokens), guesses, own_ms, num_read)
        self.take(self.scheduler.on_drafted(call.session, drafted, own_ms))


def novel(seed: int) -> Language:
    """A language that never says the same twice: there is nothing to look up."""
    return lambda tokens: 1000 + hash((seed, len(tokens), tokens[-1])) % 10**8


def expected(language: Language, prompt: Sequence[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(language(tokens))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("reach", [Reach.ANY, Reach.MARK, Reach.NONE])
@pytest.mark.parametrize("has_ngrams", [False, True])
def test_answers_are_those_without_a_draft_model(frames: int, reach: Reach, has_ngrams: bool) -> None:
    """Whatever it guesses, and whenever it says so; requests come, go and are cancelled at random."""
    for seed in range(25):
        draws = random.Random(seed)
        language = novel(seed)
        ring = DraftedRing(
            language,
            seed=seed,
            wrong=draws.choice([0.0, 0.1, 0.5, 1.0]),
            short=draws.choice([0.0, 0.2, 1.0]),
            reach=reach,
            frames=frames,
            has_ngrams=has_ngrams,
            drafts_ahead=draws.random() < 0.7,
            prompt=draws.random() < 0.5,
        )
        ring.token_ms = draws.choice([0.02, 0.1, 0.4])
        wanted: dict[str, list[int]] = {}
        for number in range(draws.randrange(1, 7)):
            name = f"r{number}"
            prompt = [draws.randrange(10, 15) for _ in range(draws.randrange(1, 40))]
            max_tokens = draws.randrange(1, 60)
            wanted[name] = expected(language, prompt, max_tokens)
            ring.take(ring.scheduler.submit(name, prompt, max_tokens, ring_pb2.Sampling()))
            for _ in range(draws.randrange(0, 12)):
                if ring.frames:
                    ring.step()
            if draws.random() < 0.2:
                ring.take(ring.scheduler.cancel(name))
        ring.run()
        for name, finish in ring.finished.items():
            assert finish == "length"
            assert ring.answers[name] == wanted[name]
        assert not ring.scheduler.requests
        started = {call.session for call in ring.calls}
        assert started <= set(ring.ended), "every session is let go"


def lone(ring: DraftedRing, max_tokens: int = 60) -> int:
    """The trips of one answer, after one that measured what trips take."""
    for name, prompt in (("warm", [1, 2, 3]), ("lone", [4, 5, 6])):
        ring.num_trips = 0
        ring.take(ring.scheduler.submit(name, prompt, max_tokens, ring_pb2.Sampling()))
        ring.run()
        assert ring.answers[name] == expected(ring.language, prompt, max_tokens)
    return ring.num_trips


def test_good_guesses_save_trips() -> None:
    assert lone(DraftedRing(novel(1), frames=1)) < 60 / 4
    assert lone(DraftedRing(novel(1), frames=1, wrong=0.2)) < 60 / 2


def test_bad_guesses_are_soon_given_up() -> None:
    ring = DraftedRing(novel(1), frames=1, wrong=1.0)
    assert lone(ring, 120) >= 120
    asked = [call for call in ring.calls if call.num_drafts and call.session == 2]
    assert len(asked) < 40


def test_a_slow_draft_model_is_not_waited_for() -> None:
    ring = DraftedRing(novel(1), frames=1)
    ring.draft_ms = 5.0  # a trip takes 1
    assert lone(ring) > 60 - 9
    assert len([call for call in ring.calls if call.num_drafts]) <= 2 * NUM_LEAST


PAUSED_PASSES = 50  # of a draft model that does not pay, in 1,000 tokens: its trials, and reading for them


def long_answer(ring: DraftedRing, prompt: list[int]) -> int:
    """Passes of the draft model in an answer of 1,000 tokens, which is as it would be without it."""
    assert ring.scheduler._limits is not None
    ring.scheduler.ring_up(1, replace(ring.scheduler._limits, context=2000))
    before = ring.num_passes
    ring.take(ring.scheduler.submit("long", prompt, 1000, ring_pb2.Sampling()))
    ring.run()
    assert ring.answers["long"] == expected(ring.language, prompt, 1000)
    return ring.num_passes - before


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize(("wrong", "short"), [(1.0, 0.0), (0.0, 1.0)])
def test_what_is_never_right_is_hardly_computed(frames: int, wrong: float, short: float) -> None:
    """Nor what says nothing at all, which is no wrong guess but takes its time."""
    ring = DraftedRing(novel(1), frames=frames, wrong=wrong, short=short)
    assert long_answer(ring, [1, 2, 3]) < PAUSED_PASSES
    assert ring.rested
    assert ring.scheduler.speculation.record.num_pauses == len(ring.rested)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_seldom_right_is_computed_little_even_where_a_trial_is_lucky(seed: int) -> None:
    """One guess in ten is right, and costs a twentieth of a trip."""
    ring = DraftedRing(novel(1), frames=1, wrong=0.9, seed=seed)
    assert long_answer(ring, [1, 2, 3]) < 200
    assert ring.rested


@pytest.mark.parametrize("frames", [1, 4])
def test_what_is_right_but_as_slow_as_the_ring_pauses(frames: int) -> None:
    ring = DraftedRing(novel(1), frames=frames)
    ring.draft_ms = 1.0
    assert long_answer(ring, [1, 2, 3]) < PAUSED_PASSES
    assert ring.rested


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("draft_ms", [0.02, 0.3])
def test_what_is_right_and_quick_never_pauses(frames: int, draft_ms: float) -> None:
    ring = DraftedRing(novel(1), frames=frames)
    ring.draft_ms = draft_ms
    assert long_answer(ring, [1, 2, 3]) > 900
    assert not ring.rested
    assert ring.num_trips < 1000 / 4


@pytest.mark.parametrize("frames", [1, 4])
def test_it_comes_back_where_the_text_changes(frames: int) -> None:
    """And goes again: wrong in the first 300 tokens, right in the next 400, wrong in the last."""
    ring = DraftedRing(novel(1), frames=frames)
    ring.wrong_at = lambda position: not 300 <= position < 700
    passes = long_answer(ring, [1, 2, 3])
    assert len(ring.rested) >= 2
    calls = [len(call.tokens) for call in ring.calls if call.num_drafts]
    busy = [sum(start <= at < start + 100 for at in calls) for start in range(0, 1000, 100)]
    assert max(busy[3:7]) > 2 * max(busy[8:]), "calls in each hundred tokens"
    assert 100 < passes < 800, "of what would be more than 1,500"


def test_a_session_that_pauses_is_not_asked_until_its_pause_is_over() -> None:
    ring = DraftedRing(novel(1), frames=1, wrong=1.0)
    long_answer(ring, [1, 2, 3])
    positions = [len(call.tokens) for call in ring.calls]
    gaps = sorted((after - before for before, after in pairwise(positions)), reverse=True)
    assert gaps[:4] == sorted(gaps[:4], reverse=True)
    assert gaps[0] >= 8 * FIRST_PAUSE_TOKENS
    assert sum(gap >= 2 * FIRST_PAUSE_TOKENS for gap in gaps) >= 3


def test_the_next_prompt_is_not_read_while_it_pauses() -> None:
    ring = DraftedRing(novel(1), frames=1, wrong=1.0)
    long_answer(ring, [1, 2, 3])
    before = len(ring.calls)
    ring.take(ring.scheduler.submit("next", list(range(10, 50)), 5, ring_pb2.Sampling()))
    ring.run()
    assert ring.calls[before:] == []
    assert not ring.scheduler.requests


def test_what_looking_up_does_better_is_not_computed() -> None:
    """A text that repeats itself: the draft model is right as well, and is not needed."""
    ring = DraftedRing(lambda tokens: 1000 + len(tokens) % 7, frames=1, has_ngrams=True, wrong=0.3)
    ring.draft_ms = 0.3
    passes = long_answer(ring, [1, 2, 3])
    assert passes < 200
    assert ring.num_trips < 1000 / 3, "looking up goes on"


def test_a_pause_ends_with_one_reading_of_what_was_missed() -> None:
    ring = DraftedRing(novel(1), frames=1, wrong=1.0)
    long_answer(ring, [1, 2, 3])
    reads = [call for call in ring.calls if not call.num_drafts]
    assert len(reads) == len(ring.rested), "the prompt, and before each trial but the first"


def test_prompts_are_read_while_the_ring_reads_them() -> None:
    ring = DraftedRing(novel(1))
    prompt = list(range(10, 40))
    ring.take(ring.scheduler.submit("r", prompt, 5, ring_pb2.Sampling()))
    (first,) = ring.asked
    assert (first.tokens, first.num_drafts, first.num_prompt, first.epoch) == (prompt, 0, 30, 1)


def test_the_first_token_waits_for_no_guess() -> None:
    ring = DraftedRing(novel(1), frames=1)
    lone(ring)
    before = len(ring.calls)
    ring.take(ring.scheduler.submit("third", [7, 8], 5, ring_pb2.Sampling()))
    ring.step()
    ring.step()
    assert [call.num_drafts for call in ring.calls[before:]] == [0]


def test_guesses_behind_guesses_fill_a_ring_of_several_frames() -> None:
    ring = DraftedRing(novel(1), frames=4)
    lone(ring)
    alone = DraftedRing(novel(1), frames=4, drafts_ahead=False)
    lone(alone)
    assert ring.most_in_flight > alone.most_in_flight


def test_without_a_draft_model_none_is_asked() -> None:
    scheduler = Scheduler(max_queued=4)
    scheduler.ring_up(1, Limits(400, 6, 2, reach=Reach.ANY, max_drafts=6))
    told = scheduler.submit("r", [1, 2, 3], 5, ring_pb2.Sampling())
    assert not [one for one in told if isinstance(one, Draft)]
    assert scheduler.on_drafted(1, Drafted(3, [1])) == []
    assert scheduler.on_drafted(77, Drafted(3, [1])) == []


# -- what is foretold -------------------------------------------------------------------------------------
def test_what_was_foretold_stands_until_something_else_is_written() -> None:
    foretold = Foretold(10)
    assert foretold.ask(4) == 10
    assert foretold.is_awaited
    assert not foretold.tell(9, [5]), "of an earlier question"
    assert foretold.tell(10, [1, 2, 3, 4])
    assert not foretold.is_awaited
    assert (foretold.after([]), foretold.after([1, 2]), foretold.after([9])) == ([1, 2, 3, 4], [3, 4], [])
    assert foretold.extend([1, 2]) == (2, 0)
    assert (foretold.position, foretold.ids) == (12, [3, 4])
    assert foretold.ask(2) == 14
    assert foretold.extend([3, 7]) == (1, 1)
    assert (foretold.position, foretold.ids, foretold.asked) == (14, [], -1)
    assert not foretold.tell(14, [5, 6]), "behind a guess that was wrong"


def test_an_answer_that_comes_late_is_cut_by_what_was_written_since() -> None:
    foretold = Foretold(10)
    foretold.ask(4)
    foretold.extend([1, 2])
    assert foretold.is_awaited
    assert foretold.tell(10, [1, 2, 3, 4])
    assert foretold.ids == [3, 4]
    foretold.extend([3, 4])
    foretold.ask(2)
    foretold.extend([5])
    assert foretold.tell(14, [6, 7])
    assert (foretold.ids, foretold.asked) == ([], -1)


def test_a_short_answer_says_that_nothing_is_likely_behind_it() -> None:
    foretold = Foretold(10)
    foretold.ask(4)
    foretold.tell(10, [1])
    assert foretold.is_ended
    foretold.extend([1])
    assert not foretold.is_ended, "behind another token something may be"
    foretold.ask(4)
    foretold.tell(11, [])
    assert foretold.is_ended
