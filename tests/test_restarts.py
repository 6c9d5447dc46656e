"""When a node that ended is started again."""

from __future__ import annotations

import pytest

from deploy.restarts import DELAYS_S, MAX_RESTARTS, WINDOW_S, Restarts, how_ended

KILLED = -9


def test_a_killed_node_is_started_again_a_bounded_number_of_times() -> None:
    restarts = Restarts()
    delays = [restarts.delay_s(KILLED, 10.0 * i, has_served=True) for i in range(MAX_RESTARTS + 1)]
    assert delays == [*DELAYS_S, None]
    assert restarts.total == MAX_RESTARTS


def test_restarts_of_long_ago_do_not_count() -> None:
    restarts = Restarts()
    for i in range(MAX_RESTARTS):
        assert restarts.delay_s(KILLED, float(i), has_served=True) is not None
    assert restarts.delay_s(KILLED, WINDOW_S + MAX_RESTARTS, has_served=True) == DELAYS_S[0]


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_end_the_same_way_again_is_left(code: int) -> None:
    assert Restarts().delay_s(code, 0.0, has_served=True) is None


def test_a_node_that_ends_by_itself_before_the_ring_served_is_left() -> None:
    assert Restarts().delay_s(1, 0.0, has_served=False) is None
    assert Restarts().delay_s(1, 0.0, has_served=True) is not None


@pytest.mark.parametrize("code", [KILLED, 0, None])
def test_an_end_that_was_not_its_own_fault_is_mended_from_the_beginning(code: int | None) -> None:
    assert Restarts().delay_s(code, 0.0, has_served=False) is not None


def test_ends_in_words() -> None:
    assert how_ended(KILLED) == "was killed by signal 9"
    assert how_ended(3) == "ended with exit code 3"
    assert how_ended(None) == "has ended"
