from __future__ import annotations

from dataclasses import replace

import pytest

from planner.chips import find_chip
from planner.speeds import DECODE_FLOPS, FormatRate, Speeds, table_speeds
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


def test_decoding_exl3_is_a_guess_until_it_is_measured() -> None:
    plain = Speeds(1e6, 1.2e6)
    assert plain.weight_bytes_ms("exl3/4") == 1.2e6 / DECODE_FLOPS * 4 / 8
    assert plain.weight_bytes_ms("affine4/64") == 1e6
    rates = FormatRate("exl3/2", 1e9, 1e9, 3000.0), FormatRate("exl3/4", 1e9, 1e9, 4000.0)
    found = replace(plain, formats=rates)
    assert [found.weight_bytes_ms(f"exl3/{bits}") for bits in (1, 2, 4, 8)] == [375, 750, 2000, 4000]
    read = replace(plain, formats=(FormatRate("exl3/3", 1e9, 1e9),))
    assert read.weight_bytes_ms("exl3/5") == 1e6  # decoded faster than it is read
    with pytest.raises(ValueError, match="decoded_ms = -1 must be a number of 0 or more"):
        FormatRate("exl3/3", 1.0, 1.0, -1)
    with pytest.raises(ValueError, match="format = 'exl3/all' must be exl3/ and a number of bits"):
        replace(plain, formats=(FormatRate("exl3/all", 1.0, 1.0),))
