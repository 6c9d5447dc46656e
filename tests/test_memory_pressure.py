from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from cluster.memory_pressure import (
    CALM_READINGS,
    TRIM_AGAIN_READINGS,
    Level,
    Pressure,
    Reading,
    decide,
)

GB = 10**9
N, W, C = Level.NORMAL, Level.WARNING, Level.CRITICAL


def free(share: float) -> Reading:
    return Reading(total_bytes=16 * GB, available_bytes=int(16 * GB * share))


def follow(readings: Iterable[Reading], elapsed_s: float = 1.0) -> list[Pressure]:
    pressure, last, seen = Pressure(), None, []
    for reading in readings:
        pressure = decide(pressure, last, reading, elapsed_s)
        last = reading
        seen.append(pressure)
    return seen


@pytest.mark.parametrize(
    ("reading", "level", "reason"),
    [
        (free(0.5), N, ""),
        (free(0.07), W, "1.12 GB of 16.0 GB are available"),
        (free(0.03), C, "0.48 GB of 16.0 GB are available"),
        (
            Reading(16 * GB, 8 * GB, some_stall_share=0.15),
            W,
            "tasks stood still for memory 15% of the time",
        ),
        (Reading(16 * GB, 8 * GB, full_stall_share=0.3), C, "all tasks stood still for memory 30%"),
        (Reading(16 * GB, 8 * GB, system_level=W), W, "macOS reports memory pressure"),
        (Reading(16 * GB, 8 * GB, system_level=C), C, "macOS reports memory pressure"),
        (Reading(0, 0), C, ""),
    ],
)
def test_one_reading(reading: Reading, level: Level, reason: str) -> None:
    (pressure,) = follow([reading])
    assert pressure.level is level
    assert reason in pressure.reason
    assert pressure.is_admitting == (level is not C)


@pytest.mark.parametrize(("written_bytes", "level"), [(0, N), (20e6, W), (100e6, C)])
def test_swap_counts_by_what_is_written_a_second(written_bytes: float, level: Level) -> None:
    before = Reading(16 * GB, 8 * GB, swap_used_bytes=9 * GB, swapped_out_bytes=50 * GB)
    after = Reading(
        16 * GB, 8 * GB, swap_used_bytes=9 * GB, swapped_out_bytes=50 * GB + int(2 * written_bytes)
    )
    assert follow([before])[0].level is N  # what was swapped before we came is no pressure
    found = follow([before, after], elapsed_s=2.0)[1]
    assert found.level is level
    assert ("a second are written to swap, 9.00 GB lie there" in found.reason) == (level is not N)


def test_it_rises_at_once_and_falls_after_calm_readings() -> None:
    seen = follow([free(0.5), free(0.03), *[free(0.5)] * CALM_READINGS])
    assert [p.level for p in seen] == [N, C, *[C] * (CALM_READINGS - 1), N]
    assert "it is recovering" in seen[2].reason
    assert seen[-1].reason == ""


def test_a_little_above_the_limit_is_not_over_yet() -> None:
    # 5 % is above the limit of 4 %, but not by half of it.
    assert [p.level for p in follow([free(0.03), *[free(0.05)] * 9])] == [C] * 10
    assert follow([free(0.03), *[free(0.07)] * CALM_READINGS])[-1].level is W


def test_one_bad_reading_begins_the_calm_anew() -> None:
    seen = follow([free(0.03), free(0.5), free(0.5), free(0.05), free(0.5), free(0.5), free(0.5)])
    assert [p.level for p in seen] == [C, C, C, C, C, C, N]


def test_a_ring_at_the_limit_does_not_flap() -> None:
    seen = follow([free(0.039 if i % 2 else 0.041) for i in range(40)])
    changes = sum(a.level is not b.level for a, b in itertools.pairwise(seen))
    assert changes <= 1


def test_the_cache_is_trimmed_when_pressure_rises_and_now_and_then_while_it_lasts() -> None:
    seen = follow([free(0.5), free(0.07), free(0.03), *[free(0.03)] * TRIM_AGAIN_READINGS, free(0.03)])
    assert [i for i, p in enumerate(seen) if p.must_trim] == [1, 2, 2 + TRIM_AGAIN_READINGS]
