from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.cost import CostModel, Link
from planner.measured import (
    MIN_STEPS,
    MeasuresError,
    StageFactor,
    StageTimes,
    TooFewStepsError,
    measured_links,
    measured_nodes,
    scaled,
    stage_factor,
)
from planner.node_profile import GB
from planner.plan import Assignment, Plan
from planner.solver import PlanOptions, make_plan
from planner.speeds import FormatRate, Speeds
from planner.workload import Workload
from tests.fake_models import made_up_model, node

MODEL = made_up_model([GB // 10] * 9, embed_bytes=GB // 50, head_bytes=GB // 20, kv_token_bytes=4096)
OPTIONS = PlanOptions(4096)


def plan_of(*parts: tuple[int, int]) -> Plan:
    nodes = [node(rank, 9, layers=part) for rank, part in enumerate(parts)]
    plan = make_plan(MODEL, nodes, (), OPTIONS)
    assert isinstance(plan, Plan)
    return plan


PART = plan_of((0, 4), (4, 9)).assignments[1]


def times_of(part: Assignment, speeds: Speeds, noise: float = 0.02, seed: int = 0) -> StageTimes:
    """What a node of these speeds would measure, its clock a little uneven."""
    rng = random.Random(seed)
    cost = CostModel(MODEL, [replace(node(part.rank, 9), measured=speeds)], (), Workload(2 * 301, 1))
    decode_ms = cost.decode_ms(0, part.start, part.stop)
    chunk = CostModel(MODEL, cost.nodes, (), Workload(2 * 201, 1))
    return StageTimes(
        decode_ms=tuple(decode_ms * (1 + noise * (2 * rng.random() - 1)) for _ in range(64)),
        decode_position=tuple(rng.randrange(290, 311) for _ in range(64)),
        chunk_ms=(chunk.chunk_ms(0, part.start, part.stop), 0.1),
        chunk_tokens=(200, 3),
        chunk_position=(0, 200),
        uptime_ms=1e6,
    )


def factor_of(rank: int, factor: float) -> StageFactor:
    return StageFactor(
        rank, f"n{rank}", 0, 1, 64, 100.0, 2.0, 2 * factor, 1.9 * factor, 2.2 * factor, 0.0, None
    )


def test_a_node_as_planned_has_the_factor_one() -> None:
    one = stage_factor(MODEL, node(1, 9), PART, times_of(PART, node(1, 9).speeds))
    assert one.factor == pytest.approx(1, rel=0.01)
    assert one.low == pytest.approx(0.99, rel=0.01)
    assert one.high == pytest.approx(1.01, rel=0.01)
    assert one.products == pytest.approx(1, rel=0.03)
    assert (one.rank, one.node, one.start, one.stop, one.num_steps) == (1, "n1", 4, 9, 64)


def test_steps_that_users_share_tell_the_same_as_those_of_one() -> None:
    speeds = scaled(node(1, 9).speeds, 3.0)
    cost, rows = CostModel(MODEL, [replace(node(1, 9), measured=speeds)], (), Workload(2 * 301, 8, 8)), 8
    shared_ms = cost.decode_ms(0, PART.start, PART.stop, is_batched=True)
    alone = times_of(PART, speeds)
    assert shared_ms > 1.05 * alone.decode_ms[0]
    mixed = replace(
        alone,
        decode_ms=tuple(shared_ms if i % 2 else ms for i, ms in enumerate(alone.decode_ms)),
        decode_rows=tuple(rows if i % 2 else 1 for i in range(64)),
    )
    one = stage_factor(MODEL, node(1, 9), PART, mixed)
    assert one.factor == pytest.approx(3, rel=0.01)


def test_a_slower_node_and_slower_products_are_found() -> None:
    speeds = scaled(node(1, 9).speeds, 3.0, 2.0)
    one = stage_factor(MODEL, node(1, 9), PART, times_of(PART, speeds))
    assert one.factor == pytest.approx(3, rel=0.01)
    assert one.products == pytest.approx(2, rel=0.03)
    short = replace(times_of(PART, speeds), chunk_tokens=(15, 3))
    assert stage_factor(MODEL, node(1, 9), PART, short).products is None


def test_scaled_speeds_scale_every_time() -> None:
    speeds = Speeds(5e7, 1e9, formats=(FormatRate("affine4/64", 1e6, 2e9),))
    slow = scaled(speeds, 2.0, 3.0)
    assert (slow.read_bytes_ms, slow.flops_ms, slow.layer_ms, slow.stage_ms) == pytest.approx(
        (2.5e7, 1e9 / 6, 2 * speeds.layer_ms, speeds.stage_ms)
    )
    assert slow.formats[0] == FormatRate("affine4/64", 5e5, 2e9 / 6)
    assert slow.source == "measured"
    for work in (Workload(256, 1), Workload(8192, 4)):
        plain, twice = (
            CostModel(MODEL, [replace(node(0, 9), measured=one)], (), work)
            for one in (speeds, scaled(speeds, 2.0))
        )
        waking = speeds.stage_ms
        assert twice.decode_ms(0, 2, 9) - waking == pytest.approx(2 * (plain.decode_ms(0, 2, 9) - waking))
        assert twice.chunk_ms(0, 0, 9) - waking == pytest.approx(2 * (plain.chunk_ms(0, 0, 9) - waking))
    assert scaled(speeds, 0.5).stage_ms == pytest.approx(0.5 * speeds.stage_ms)


def test_two_equal_nodes_are_equally_slow_however_many_layers_they_have() -> None:
    """Both take 0.6 ms more a layer than planned, and neither looks faster than the other."""
    slow = replace(node(0, 9).speeds, layer_ms=node(0, 9).speeds.layer_ms + 0.6)
    parts = plan_of((0, 8), (8, 9)).assignments
    long, short = (stage_factor(MODEL, node(0, 9), part, times_of(part, slow)) for part in parts)
    assert long.factor == pytest.approx(short.factor, rel=0.15)


def test_too_few_steps_say_how_many_are_missing() -> None:
    few = StageTimes(decode_ms=(1.0, 2.0), decode_position=(3, 4))
    with pytest.raises(TooFewStepsError, match=r"^stage 1 \(n1, layers 4:9\) has made 2 of the 32") as caught:
        stage_factor(MODEL, node(1, 9), PART, few)
    assert caught.value.num_missing == MIN_STEPS - 2


@pytest.mark.parametrize(
    ("decode_ms", "uptime_ms", "message"),
    [
        ([0.0] * 40, 1e6, "stage 1 .* reports a decode step of 0 ms: its clock does not run"),
        ([1.0] * 39 + [-1.0], 1e6, "reports a decode step of -1 ms: its clock does not run"),
        ([1.0] * 39 + [float("nan")], 1e6, "reports a decode step of nan ms: its clock does not run"),
        ([1.5] * 40, 1e6, "reports 1.5 ms for every decode step: its clock does not run"),
        (
            [1.0, 2.0] * 20,
            50.0,
            "reports 60 ms of decode steps, and has been up for 50 ms",
        ),
        ([1e8, 2e8] * 20, float("inf"), "where .* ms are expected: one of them cannot be right"),
        ([1e-8, 2e-8] * 20, 1e6, "where .* ms are expected: one of them cannot be right"),
    ],
)
def test_times_that_no_clock_gives_are_refused(
    decode_ms: list[float], uptime_ms: float, message: str
) -> None:
    times = StageTimes(tuple(decode_ms), (100,) * 40, uptime_ms=uptime_ms)
    with pytest.raises(MeasuresError, match=message):
        stage_factor(MODEL, node(1, 9), PART, times)


def test_nodes_that_measured_nothing_are_scaled_as_those_like_them() -> None:
    nodes = [
        node(0, 9, "Apple M4"),
        node(1, 9, "Apple M4"),
        node(2, 9, "Apple M4"),
        node(3, 9, "Apple M1"),
        node(4, 9, "Apple M2 Max"),
    ]
    found = [factor_of(0, 2.0), factor_of(1, 4.0), factor_of(3, 1.0)]
    factors = [
        plain.speeds.read_bytes_ms / one.speeds.read_bytes_ms
        for plain, one in zip(nodes, measured_nodes(nodes, found), strict=True)
    ]
    assert factors == pytest.approx([2, 4, 3, 1, 2])
    chosen = measured_nodes(nodes, found, {0: 8.0})[0]
    assert nodes[0].speeds.layer_ms * 8 == pytest.approx(chosen.speeds.layer_ms)


def test_hops_take_the_place_of_latencies() -> None:
    links = [Link(frozenset((0, 1)), 0.3, 2.5), Link(frozenset((0, 2)), 9.0)]
    hops = {(0, 1): [4.0, 5.0, 90.0], (1, 0): [7.0], (1, 2): [0.2], (2, 2): [5.0], (2, 0): []}
    found = {link.ranks: link for link in measured_links(links, hops)}
    assert found == {
        frozenset((0, 1)): Link(frozenset((0, 1)), 6.0, 2.5),
        frozenset((0, 2)): Link(frozenset((0, 2)), 9.0),
        frozenset((1, 2)): Link(frozenset((1, 2)), 0.2),
    }
    with pytest.raises(MeasuresError, match="the hop from rank 1 to rank 0 is reported to take 0"):
        measured_links([], {(1, 0): [0.5, 0.0]})
