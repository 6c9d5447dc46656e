from __future__ import annotations

import pytest

from cluster.trip_times import PRIOR_SLOPE, TripTimes


def test_before_anything_is_measured_a_token_more_costs_little() -> None:
    times = TripTimes()
    assert not times.is_measured
    assert times.ratio(1) == 1.0
    assert times.ratio(5) == pytest.approx(1.0 + 4 * PRIOR_SLOPE)


def test_between_two_lengths_and_beyond_them_it_is_a_line() -> None:
    times = TripTimes()
    for ms in (10.0, 10.0, 11.0, 90.0):  # the median counts
        times.add(1, ms)
    assert times.is_measured
    assert times.ratio(5) == pytest.approx(1.0 + 4 * PRIOR_SLOPE)  # no longer one is known
    times.add(3, 15.75)
    assert times.ratio(2) == pytest.approx(1.25)
    assert times.ratio(3) == pytest.approx(1.5)
    assert times.ratio(5) == pytest.approx(2.0)
    times.add(7, 21.0)
    assert times.ratio(5) == pytest.approx(1.75)
    assert times.ratio(7) == pytest.approx(2.0)


def test_a_longer_frame_that_seemed_quicker_is_no_reason_to_expect_still_less() -> None:
    times = TripTimes()
    for _ in range(3):
        times.add(1, 10.0)
    times.add(4, 9.0)
    assert times.ratio(8) == pytest.approx(0.9)


def test_only_the_latest_times_count() -> None:
    times = TripTimes()
    for _ in range(20):
        times.add(1, 100.0)
    for _ in range(20):
        times.add(1, 10.0)
    times.add(2, 12.0)
    assert times.ratio(2) == pytest.approx(1.2)
