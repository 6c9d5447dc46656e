"""The estimator, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cluster.profile_timing import Effort, Estimate, measure, time_once_ms

EFFORT = Effort(
    target_ms=10,
    num_calls=3,
    min_rounds=2,
    max_rounds=4,
    budget_s=10.0,
    pool_bytes=0,
    disk_bytes=0,
    has_all_formats=False,
)


class Scripted:
    """Calls that take what a list says, and a log of who ran."""

    def __init__(self) -> None:
        self.now_s, self.log = 0.0, ""

    def clock(self) -> float:
        return self.now_s

    def case(self, name: str, *ms: float) -> Callable[[], None]:
        times: Iterator[float] = iter(ms)

        def run() -> None:
            self.log += name
            self.now_s += next(times) / 1e3

        return run


def test_cases_take_turns_and_the_best_median_counts() -> None:
    machine = Scripted()
    cases = {
        "a": machine.case("a", 99, *(5, 90, 6), *(7, 8, 9), *(4, 5, 90), *(9, 9, 9)),
        "b": machine.case("b", 99, *[2] * 12),
    }
    rounds: list[int] = []
    found = measure(cases, EFFORT, rounds.append, [machine.clock])
    assert machine.log == "ab" + "aaabbb" * 4  # the first call of each is not timed
    assert found["a"].ms == pytest.approx(5)  # of 6, 8, 5, 9
    assert found["a"].spread == pytest.approx(7 / 5 - 1)
    assert (found["b"].num_rounds, found["b"].spread) == (4, pytest.approx(0))
    assert rounds == [1, 2, 3, 4]


def test_a_long_call_is_made_once_a_round() -> None:
    machine = Scripted()
    found = measure({"a": machine.case("a", 99, 40, 50, 31, 60)}, EFFORT, clocks=[machine.clock])
    assert machine.log == "a" * 5
    assert found["a"].ms == pytest.approx(31)


def test_no_round_begins_after_the_budget_but_some_always_do() -> None:
    machine = Scripted()
    found = measure({"a": machine.case("a", 99, *[20_000] * 4)}, EFFORT, clocks=[machine.clock])
    assert found["a"].num_rounds == EFFORT.min_rounds


def test_a_clock_that_stands_still_gives_no_zero() -> None:
    found = measure({"a": lambda: None}, EFFORT, clocks=[lambda: 1.0])
    assert found["a"] == Estimate(1e-6, found["a"].spread, 4)


def test_sizes_are_found_with_the_second_call() -> None:
    machine = Scripted()
    assert time_once_ms(machine.case("a", 500, 7), [machine.clock]) == pytest.approx(7)


def test_of_two_clocks_the_one_that_says_less_counts() -> None:
    machine = Scripted()
    clocks = [machine.clock, lambda: machine.now_s / 4]
    assert time_once_ms(machine.case("a", 500, 8), clocks) == pytest.approx(2)
    assert time_once_ms(machine.case("a", 500, 8), clocks[:1]) == pytest.approx(8)
