"""How long a device is busy for sure: never longer than it was, and less where that was seen too late."""

from __future__ import annotations

import time

import pytest

from cluster.pace import MAX_KINDS, MIN_TIMES, NUM_TIMES, SURE_SHARE, Pace
from proto import ring_pb2


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def frame(num_rows: int = 1, num_tokens: int = 1) -> ring_pb2.Frame:
    slots = [ring_pb2.Slot(session=i, tokens=range(num_tokens)) for i in range(num_rows)]
    return ring_pb2.Frame(kind=ring_pb2.STEP, slots=slots)


def test_the_shortest_of_the_latest_times_counts(clock: Clock) -> None:
    pace = Pace()
    assert pace.sure_s(frame(), 0.0) == 0.0
    for time_s in (5.0, 3.0, 4.0):
        began, clock.now = clock.now, clock.now + time_s
        pace.end(frame(), began)
    assert pace.sure_s(frame(), clock.now) == pytest.approx(3.0 * SURE_SHARE)
    assert pace.sure_s(frame(2), clock.now) == pace.sure_s(frame(1, 7), clock.now) == 0.0
    for _ in range(NUM_TIMES):
        began, clock.now = clock.now, clock.now + 9.0
        pace.end(frame(), began)
    assert pace.sure_s(frame(), clock.now) == pytest.approx(9.0 * SURE_SHARE)
    clock.now += 2.0
    assert pace.sure_s(frame(), clock.now - 2.0) == pytest.approx(9.0 * SURE_SHARE - 2.0)
    clock.now += 20.0
    assert pace.sure_s(frame(), clock.now - 22.0) == 0.0


def test_a_frame_begins_when_the_one_before_has_ended(clock: Clock) -> None:
    pace = Pace()
    clock.now = 4.0
    pace.end(frame(), 0.0)
    clock.now = 6.0
    pace.end(frame(2), 1.0)  # was given to the device at 1, and begun at 4
    clock.now = 8.0
    pace.end(frame(2), 2.0)
    assert pace.sure_s(frame(2), 8.0) == pytest.approx(2.0 * SURE_SHARE)
    assert pace.sure_s(frame(2), 3.0) == pytest.approx(2.0 * SURE_SHARE)


def test_a_time_that_was_seen_too_late_is_found_out(clock: Clock) -> None:
    """The device takes 1 s; who looks late first looks earlier each time."""
    pace, waits = Pace(), []
    for _ in range(MIN_TIMES):
        began, clock.now = clock.now, clock.now + 10.0
        pace.end(frame(), began)
    for _ in range(20):
        began = clock.now
        waits.append(pace.sure_s(frame(), began))
        clock.now = began + max(waits[-1], 1.0)
        pace.end(frame(), began)
    assert waits == sorted(waits, reverse=True)
    assert waits[-1] == pytest.approx(SURE_SHARE)


def test_only_so_many_kinds_are_known(clock: Clock) -> None:
    pace = Pace()
    for num_tokens in range(1, MAX_KINDS + 2):
        for _ in range(MIN_TIMES):
            clock.now += 1.0
            pace.end(frame(1, num_tokens), clock.now - 1.0)
    assert pace.sure_s(frame(1, 1), clock.now) == 0.0
    assert pace.sure_s(frame(1, 2), clock.now) > 0.0
    pace.end(ring_pb2.Frame(kind=ring_pb2.STEP), clock.now)


def test_a_first_frame_that_waited_for_a_compiler_keeps_nobody_waiting(clock: Clock) -> None:
    pace = Pace()
    clock.now = 5.0
    pace.end(frame(), 0.0)
    assert pace.sure_s(frame(), clock.now) == 0.0
    began, clock.now = clock.now, clock.now + 0.01
    pace.end(frame(), began)
    assert pace.sure_s(frame(), clock.now) == pytest.approx(0.01 * SURE_SHARE)
