from __future__ import annotations

from dataclasses import replace

import pytest

from planner.chips import find_chip
from planner.speeds import FormatRate, Speeds, table_speeds
from tests.fake_models import node


def test_the_table_speaks_where_nothing_was_measured() -> None:
    plain = node(0, 16, "Apple M4")
    assert plain.speeds == table_speeds(find_chip("Apple M4", None))
    assert plain.speeds.source == "table"
    found = Speeds(50e6, 1e9, source="measured")
    assert replace(plain, measured=found).speeds == found


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_are_numbers_above_zero(rate: float) -> None:
    with pytest.raises(ValueError, match=r"read_bytes_ms = .* must be a number above 0"):
        Speeds(rate, 1.0)
    with pytest.raises(ValueError, match=r"flops_ms = .* must be a number above 0"):
        FormatRate("float32", 1.0, rate)


def test_launching_takes_no_time_or_some() -> None:
    assert Speeds(1.0, 1.0, layer_ms=0.0).layer_ms == 0
    with pytest.raises(ValueError, match=r"stage_ms = -0.1 must be a number of 0 or more"):
        Speeds(1.0, 1.0, stage_ms=-0.1)


def test_a_format_has_one_rate() -> None:
    rate = FormatRate("affine4/64", 1.0, 1.0)
    with pytest.raises(ValueError, match="affine4/64 names one twice"):
        Speeds(1.0, 1.0, formats=(rate, rate))
