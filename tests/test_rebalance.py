"""The advice, from made-up measurements of nodes whose true speeds the test knows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.cost import CostModel, Link
from planner.measured import StageTimes, scaled, stages_of
from planner.node_profile import NodeProfile
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.rebalance import MIN_GAIN, Advice, NoAdviceError, advise
from planner.solver import PlanOptions, make_plan
from planner.workload import Workload
from tests.fake_models import node
from tests.random_clusters import random_case
from tests.test_measured import MODEL, OPTIONS, times_of

LINKS = (Link(frozenset((0, 1)), 0.2), Link(frozenset((1, 2)), 0.2), Link(frozenset((0, 2)), 0.2))


def plan_of(planned: PlannedFrom) -> Plan:
    plan = make_plan(planned.model, planned.nodes, planned.links, planned.options)
    assert isinstance(plan, Plan)
    return plan


def three(*budgets_gb: float, layers: tuple[tuple[int, int] | None, ...] = (None,) * 3) -> PlannedFrom:
    nodes = tuple(
        node(rank, gb, layers=part) for rank, (gb, part) in enumerate(zip(budgets_gb, layers, strict=True))
    )
    return PlannedFrom(MODEL, nodes, LINKS, OPTIONS)


def advice_of(
    planned: PlannedFrom,
    factors: dict[int, float],
    *,
    noise: float = 0.02,
    hop_ms: float = 0.2,
    plan: Plan | None = None,
    keeps_forced: bool = False,
    objective: str | None = None,
) -> Advice:
    """For a ring whose nodes truly take so many times as long as planned."""
    plan = plan or plan_of(planned)
    by_rank = {n.rank: n for n in planned.nodes}
    times = {
        part.rank: times_of(
            part, scaled(by_rank[part.rank].speeds, factors[part.rank]), noise, seed=part.rank
        )
        for part in plan.assignments
    }
    ranks = [part.rank for part in plan.assignments]
    hops = {(a, b): [hop_ms, hop_ms * 1.01] for a, b in zip(ranks, [*ranks[1:], 0], strict=True) if a != b}
    return advise(planned, plan, times, hops, objective=objective, keeps_forced=keeps_forced)


def parts(plan: Plan) -> dict[str, tuple[int, int]]:
    return {part.node: (part.start, part.stop) for part in plan.assignments}


def test_a_ring_that_is_as_planned_is_left_alone() -> None:
    planned = three(0.7, 0.7, 0.7)
    advice = advice_of(planned, dict.fromkeys(range(3), 1.0))
    assert advice.verdict == "leave"
    assert advice.gain < 0.01


def test_an_error_that_all_nodes_share_is_no_reason_to_move() -> None:
    """Also not to a node without layers, which has measured nothing."""
    planned = three(0.7, 0.7, 0.7)
    assert len(plan_of(planned).assignments) == 2
    advice = advice_of(planned, dict.fromkeys(range(3), 1.6))
    assert (advice.verdict, advice.unmeasured, advice.untested) == ("leave", ("n2",), None)


def test_a_slow_node_loses_layers() -> None:
    planned = three(0.9, 0.9, 0.9, layers=((0, 5), (5, 9), None))
    advice = advice_of(planned, {0: 4.0, 1: 1.0})
    assert advice.verdict == "replan"
    assert parts(advice.present) == {"n0": (0, 5), "n1": (5, 9)}
    kept = parts(advice.best).get("n0", (0, 0))
    assert kept[1] - kept[0] < 5
    assert advice.low_gain > MIN_GAIN
    assert advice.low_gain <= advice.gain <= advice.high_gain
    assert advice.freed == ("n0", "n1")
    moved = {move.node: move for move in advice.moves}
    assert moved["n0"].free_bytes > 0
    assert sum(move.load_bytes for move in advice.moves) >= 3 * (10**9 // 10)


def test_following_the_advice_brings_what_it_says_and_ends_it() -> None:
    """The new ring, measured again by true speeds, has the predicted time, and is then left alone."""
    factors = {0: 3.0, 1: 1.0, 2: 0.8}
    planned = three(0.7, 0.7, 0.7, layers=((0, 3), (3, 6), (6, 9)))
    first = advice_of(planned, factors)
    assert first.verdict == "replan"
    wanted = parts(first.best)
    forced = tuple(replace(n, layers=wanted.get(n.name)) for n in planned.nodes)
    again = replace(planned, nodes=forced)
    true = CostModel(
        MODEL,
        [replace(n, measured=scaled(n.speeds, factors[n.rank])) for n in forced],
        LINKS,
        Workload(OPTIONS.context, 1),
    )
    true_ms = true.path_ms(stages_of(first.best.assignments, true.nodes))
    assert 1e3 / first.best.predicted.decode_tok_s == pytest.approx(true_ms, rel=0.02)
    second = advice_of(again, factors)
    assert (second.verdict, second.gain) == ("leave", 0)
    assert second.unmeasured == ("n0",)
    assert second.untested is not None  # taken to be as fast as the others, and the head saves a hop
    assert second.untested_gain > MIN_GAIN


def test_speeds_that_were_measured_before_are_trusted() -> None:
    planned = three(0.7, 0.7, 0.7, layers=((0, 5), (5, 9), None))
    assert advice_of(planned, {0: 1.0, 1: 4.0}).unmeasured == ("n2",)
    fast = replace(planned.nodes[2], measured=replace(planned.nodes[2].speeds, source="measured"))
    advice = advice_of(replace(planned, nodes=(*planned.nodes[:2], fast)), {0: 1.0, 1: 4.0})
    assert (advice.verdict, advice.unmeasured) == ("replan", ())
    assert "n2" in parts(advice.best)


def test_forced_layers_stay_where_they_are_if_asked() -> None:
    planned = three(0.9, 0.9, 0.9, layers=((0, 5), (5, 9), None))
    advice = advice_of(planned, {0: 4.0, 1: 1.0}, keeps_forced=True)
    assert (advice.verdict, advice.freed, advice.is_kept) == ("leave", (), True)
    assert advice.present.assignments == advice.best.assignments


def test_slow_hops_are_reason_enough() -> None:
    planned = three(2, 2, 2, layers=((0, 3), (3, 6), (6, 9)))
    advice = advice_of(planned, dict.fromkeys(range(3), 1.0), hop_ms=20.0)
    assert advice.verdict == "replan"
    assert len(advice.best.assignments) == 1
    assert [hop.measured_ms for hop in advice.hops] == pytest.approx([20.1] * 3, rel=0.01)
    assert [hop.expected_ms for hop in advice.hops] == pytest.approx([0.2] * 3, rel=0.01)


def test_a_small_gain_is_none() -> None:
    planned = three(0.9, 0.9, 0.9, layers=((0, 5), (5, 9), None))
    advice = advice_of(planned, {0: 1.05, 1: 1.0})
    assert 0 < advice.gain < MIN_GAIN
    assert advice.verdict == "leave"
    assert advice.best.assignments != advice.present.assignments


def test_steps_of_very_different_length_make_a_gain_uncertain() -> None:
    planned = three(0.7, 0.7, 0.7, layers=((0, 5), (5, 9), None))
    advice = advice_of(planned, {0: 1.3, 1: 1.0}, noise=0.9)
    assert advice.gain >= MIN_GAIN > advice.low_gain
    assert advice.verdict == "uncertain"


@pytest.mark.parametrize("objective", ["latency", "throughput", "ttft"])
def test_each_objective_has_its_advice(objective: str) -> None:
    planned = three(0.9, 0.9, 0.9, layers=((0, 5), (5, 9), None))
    advice = advice_of(planned, {0: 4.0, 1: 1.0}, objective=objective)
    assert (advice.verdict, advice.objective) == ("replan", objective)
    assert advice.best.objective == objective


def test_illegal_cuts_are_not_advised() -> None:
    planned = three(0.9, 0.9, 0.9, layers=((0, 5), (5, 9), None))
    planned = replace(planned, options=replace(planned.options, legal_cuts=frozenset({2, 5})))
    advice = advice_of(planned, {0: 4.0, 1: 1.0})
    assert set(advice.best.cuts) <= {2, 5}


def test_a_plan_beyond_its_budgets_cannot_be_compared() -> None:
    planned = three(0.9, 0.9, 0.9, layers=((0, 5), (5, 9), None))
    plan = plan_of(planned)
    poor = replace(planned, nodes=tuple(replace(n, ceiling_bytes=10**8) for n in planned.nodes))
    with pytest.raises(
        NoAdviceError, match="the present plan exceeds the budgets that it was made for: made"
    ):
        advice_of(poor, {0: 1.0, 1: 1.0}, plan=plan)


def test_no_advice_makes_it_worse() -> None:
    """Random clusters and true speeds: the best plan is never slower than the present one, and it fits."""
    num_advised = 0
    for case in range(60):
        rng = random.Random(60_000 + case)
        cost = random_case(rng, max_layers=8, max_nodes=4)
        options = PlanOptions(cost.work.context, cost.work.concurrency, rng.choice(["optimal", "uniform"]))
        planned = PlannedFrom(cost.model, cost.nodes, cost.links, options)
        plan = make_plan(cost.model, cost.nodes, cost.links, options)
        if not isinstance(plan, Plan):
            continue
        advice = advise(planned, plan, _measured(cost, plan, rng), {})
        assert advice.gain >= 0
        assert all(part.need_bytes <= part.budget_bytes for part in advice.best.assignments)
        assert (advice.verdict == "leave") == (advice.gain < MIN_GAIN)
        num_advised += advice.verdict != "leave"
    assert num_advised > 5


def _measured(cost: CostModel, plan: Plan, rng: random.Random) -> dict[int, StageTimes]:
    by_rank: dict[int, NodeProfile] = {n.rank: n for n in cost.nodes}
    times = {}
    for part in plan.assignments:
        own = CostModel(cost.model, [by_rank[part.rank]], (), Workload(2 * 101, 1))
        own_ms = own.decode_ms(0, part.start, part.stop) * rng.choice([0.5, 1.0, 1.0, 3.0])
        steps = tuple(own_ms * rng.uniform(0.98, 1.02) for _ in range(40))
        times[part.rank] = StageTimes(steps, (100,) * 40)
    return times


def test_a_ring_that_was_forced_beyond_its_budgets_is_priced_as_it_is() -> None:
    planned = three(0.4, 0.4, 0.1, layers=((0, 5), (5, 9), None))
    planned = replace(planned, options=replace(planned.options, is_forced=True))
    advice = advice_of(planned, {0: 1.0, 1: 1.0}, keeps_forced=True)
    assert advice.verdict == "leave"
    assert parts(advice.present) == {"n0": (0, 5), "n1": (5, 9)}
