"""Whether a draft model pays: what verdicts say, how long it pauses, and what a new answer begins with."""

from __future__ import annotations

import random

import pytest

from cluster.draft_pay import (
    CATCH_UP_SHARE,
    FIRST_PAUSE_TOKENS,
    KEEP_GAIN,
    MAX_PAUSE_TOKENS,
    NUM_LEAST,
    NUM_TRIAL,
    PROVE_GAIN,
    DraftPay,
    DraftRecord,
    Pause,
    Turn,
)


def turns(pay: DraftPay, num_tokens: int, trips: float, number: int) -> list[Turn]:
    """At most so many verdicts, until it is paused."""
    told: list[Turn] = []
    while len(told) < number and not pay.is_paused:
        told.append(pay.judge(num_tokens, trips))
    return told


def test_what_brings_more_than_it_takes_is_proved_once_and_never_paused() -> None:
    pay = DraftPay(Pause())
    told = turns(pay, 3, 1.6, 500)
    assert told.index(Turn.PROVED) == NUM_TRIAL - 1
    assert told.count(Turn.PROVED) == 1
    assert Turn.PAUSED not in told
    assert pay.is_proved


@pytest.mark.parametrize(("num_tokens", "trips"), [(1, 1.2), (1, 1.6), (2, 2.3), (9, 20.0)])
def test_what_takes_more_than_it_brings_is_paused_within_a_trial(num_tokens: int, trips: float) -> None:
    pay = DraftPay(Pause())
    assert Turn.PAUSED in turns(pay, num_tokens, trips, NUM_TRIAL)
    assert pay.pause.num_failed == 1


def test_what_brings_as_much_as_it_takes_stays_where_it_was_proved_and_fails_a_trial() -> None:
    """Between the two limits nothing changes: that is the hysteresis."""
    between = (KEEP_GAIN + PROVE_GAIN) / 2
    proved = DraftPay(Pause(), is_proved=True)
    assert set(turns(proved, 1, 1 / between, 500)) == {Turn.NONE}
    tried = DraftPay(Pause())
    for _ in range(NUM_TRIAL - 1):
        assert tried.judge(1, 1.06) is Turn.NONE
    assert tried.gain >= KEEP_GAIN
    assert tried.judge(1, 1.06) is Turn.PAUSED


def test_the_first_of_a_trial_counts_for_nothing_and_the_next_few_decide_nothing_yet() -> None:
    """It waits for what is left to read, and a processor that is cold."""
    pay = DraftPay(Pause())
    before = pay.gain
    assert pay.judge(1, 9.0) is Turn.NONE
    assert pay.gain == before
    assert set(turns(pay, 1, 2.5, NUM_LEAST - 2)) == {Turn.NONE}
    assert pay.is_due, "whatever is expected"
    assert pay.judge(1, 2.5) is Turn.PAUSED


def test_one_trip_that_stood_still_pauses_nothing() -> None:
    pay = DraftPay(Pause(), is_proved=True)
    assert set(turns(pay, 3, 1.5, 50)) == {Turn.NONE}
    assert pay.judge(3, 5000.0) is Turn.NONE


def test_pauses_double_up_to_a_bound_and_begin_small_again_where_it_paid() -> None:
    pause, lengths = Pause(), []
    for _ in range(12):
        pause.begin(has_failed=True)
        lengths.append(pause.num_tokens)
        pause.end()
    assert lengths[:3] == [2 * FIRST_PAUSE_TOKENS, 4 * FIRST_PAUSE_TOKENS, 8 * FIRST_PAUSE_TOKENS]
    assert lengths[-1] == MAX_PAUSE_TOKENS
    assert lengths == sorted(lengths)
    pause.begin(has_failed=False)
    assert pause.num_tokens == FIRST_PAUSE_TOKENS


def test_reading_what_was_missed_is_paid_for_by_the_pause() -> None:
    """Cheap to read: at once. Dear: when it has become a small share; and some time whatever it costs."""
    pause = Pause()
    pause.begin(has_failed=True)
    pause.num_written = pause.num_tokens - 1
    assert not pause.is_over(0, 0.0)
    pause.num_written += 1
    assert pause.is_over(1000, 0.0)
    share = CATCH_UP_SHARE * pause.num_written
    assert pause.is_over(100, 0.99 * share / 100)
    assert not pause.is_over(100, 1.01 * share / 100)
    pause.num_written = MAX_PAUSE_TOKENS
    assert pause.is_over(2 * MAX_PAUSE_TOKENS, 10.0)
    assert not pause.is_over(9 * MAX_PAUSE_TOKENS, 10.0), "a long prompt, that a short wait does not pay for"
    pause.num_written = 5 * MAX_PAUSE_TOKENS
    assert pause.is_over(10 * MAX_PAUSE_TOKENS, 10.0)


def test_every_pause_ends_whatever_reading_costs() -> None:
    draws = random.Random(5)
    for _ in range(300):
        pause, prompt = Pause(draws.randrange(20)), draws.randrange(20_000)
        pause.begin(has_failed=draws.random() < 0.8)
        while not pause.is_over(prompt + pause.num_written, draws.random() * 50):
            pause.num_written += draws.randrange(1, 9)
        assert pause.num_written < max(MAX_PAUSE_TOKENS, prompt) + 9


def test_a_trial_forgets_what_was_before_it() -> None:
    pay = DraftPay(Pause())
    turns(pay, 1, 1.5, NUM_TRIAL)
    assert pay.is_paused
    assert not pay.is_due
    pay.resume()
    assert pay.is_due, "it is asked once, whatever is expected"
    assert not pay.is_paused
    told = turns(pay, 3, 1.5, NUM_TRIAL)
    assert told[-1] is Turn.PROVED
    assert not pay.is_due
    assert pay.pause.num_failed == 0


def test_a_new_answer_begins_with_what_is_left_of_the_last_ones_pause() -> None:
    record = DraftRecord()
    first = record.begin()
    assert not first.is_paused
    record.note(first.stop(), first)
    record.write(10)
    second = record.begin()
    assert second.pause.num_tokens == first.pause.num_tokens - 10
    record.write(first.pause.num_tokens)
    third = record.begin()
    assert not third.is_paused
    assert not third.is_proved
    record.note(third.stop(), third)
    assert third.pause.num_tokens == 2 * first.pause.num_tokens
    assert record.num_pauses == 2


def test_where_it_paid_the_next_answer_is_no_trial() -> None:
    record = DraftRecord()
    pay = record.begin()
    for turn in turns(pay, 3, 1.5, NUM_TRIAL):
        record.note(turn, pay)
    assert record.begin().is_proved
