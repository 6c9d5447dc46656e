"""From times to speeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.profile_fit import TimedProduct, fit_speeds
from planner.cost import CostModel
from planner.layer_profile import WeightFormat
from planner.node_profile import GB, make_node
from planner.workload import Workload
from tests.fake_models import made_up_model


def product(name: str, rows: int, ms: float, bytes_per_weight: float = 2.0) -> TimedProduct:
    """A million weights."""
    return TimedProduct(name, rows, 10**6, int(10**6 * bytes_per_weight), ms)


def predicted_ms(speeds_of: object, name: str, rows: int, bytes_per_weight: float) -> float:
    """As the cost model has it, for a million weights."""
    speeds = fit_speeds(PRODUCTS, 0.1, 0.2)
    rate = speeds.of(name)
    assert rate is not None
    return max(10**6 * bytes_per_weight / speeds.read_bytes_ms, rows * 10**6 / rate.weights_ms)


PRODUCTS = [
    *(product("bfloat16", rows, ms) for rows, ms in ((1, 2.0), (8, 4.0), (512, 100.0))),
    *(product("float16", rows, ms) for rows, ms in ((1, 2.2), (8, 2.4), (512, 90.0))),
    *(product("affine4/64", rows, ms, 0.5625) for rows, ms in ((1, 5.0), (8, 41.0), (512, 2500.0))),
]


def test_one_row_of_every_format_is_predicted_as_measured() -> None:
    speeds = fit_speeds(PRODUCTS, 0.1, 0.2)
    assert speeds.read_bytes_ms == 10**6  # of bfloat16, the fastest reader
    assert predicted_ms(speeds, "bfloat16", 1, 2.0) == pytest.approx(2.0)
    assert predicted_ms(speeds, "affine4/64", 1, 0.5625) == pytest.approx(5.0)  # arithmetic
    assert predicted_ms(speeds, "float16", 1, 2.0) == pytest.approx(2.0)  # within 15 % of the fastest
    assert (speeds.layer_ms, speeds.stage_ms, speeds.source) == (0.1, 0.2, "measured")


def test_rows_of_a_format_that_memory_binds_cost_what_several_cost() -> None:
    speeds = fit_speeds(PRODUCTS, 0.1, 0.2)
    assert predicted_ms(speeds, "bfloat16", 8, 2.0) == pytest.approx(4.0)
    assert predicted_ms(speeds, "float16", 8, 2.0) == pytest.approx(2.4)
    assert predicted_ms(speeds, "affine4/64", 8, 0.5625) == pytest.approx(40.0)


def test_large_products_have_a_rate_each_and_attention_that_of_bfloat16() -> None:
    speeds = fit_speeds(PRODUCTS, 0.1, 0.2)
    rate = speeds.of("affine4/64")
    assert rate is not None
    assert rate.flops_ms == pytest.approx(2 * 512 * 10**6 / 2500)
    assert speeds.flops_ms == pytest.approx(2 * 512 * 10**6 / 100)
    only = fit_speeds(PRODUCTS[6:], 0.1, 0.2)
    assert only.flops_ms == rate.flops_ms


def test_formats_that_were_timed_in_part_are_left_out() -> None:
    speeds = fit_speeds([*PRODUCTS, product("mxfp4", 1, 1.0)], 0, 0)
    assert speeds.of("mxfp4") is None
    with pytest.raises(ValueError, match="no product of weights could be timed"):
        fit_speeds([product("mxfp4", 1, 1.0)], 0, 0)


def exl3_ms(rows: int, *products: TimedProduct) -> float:
    """A decode step of `rows` over one layer of a million weights in 3 bits, as the cost model has it."""
    speeds = fit_speeds([*PRODUCTS, *products], 0.0, 0.0)
    own = WeightFormat("exl3/3", 3 * 10**6 // 8, 0, 10**6)
    (layer,) = made_up_model([3 * 10**6 // 8]).layers
    model = replace(made_up_model([1]), layers=(replace(layer, formats=(own,)),))
    node = replace(make_node(0, "n", "h", memory_bytes=GB, chip="Apple M4"), measured=speeds)
    cost = CostModel(model, [node], (), Workload(2, rows, rows))
    return float(cost.decode_sums_ms(0, is_batched=True)[1])


def test_exl3_is_decoded_once_for_all_rows() -> None:
    """Decoding binds one row to four; from then on each row costs its part of what eight took."""
    own = [product("exl3/3", rows, ms, 0.375) for rows, ms in ((1, 4.0), (8, 8.0), (512, 200.0))]
    assert [exl3_ms(rows, *own) for rows in (1, 4, 6, 8)] == pytest.approx([4.0, 4.0, 6.0, 8.0])
    fast = [product("exl3/3", rows, ms, 0.375) for rows, ms in ((1, 0.375), (8, 0.5), (512, 20.0))]
    speeds = fit_speeds([*PRODUCTS, *fast], 0, 0)
    (rate,) = [rate for rate in speeds.formats if rate.format == "exl3/3"]
    assert rate.decoded_ms == 0.0  # memory binds it
    assert exl3_ms(1, *fast) == pytest.approx(0.375)
