"""What every strategy promises; that `optimal` is optimal is test_optimal.py's."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from planner.cost import CostModel, Link, Stage
from planner.forced import ForcedLayersError
from planner.node_profile import GB, NodeProfile
from planner.plan import Plan, Refusal
from planner.solver import STRATEGIES, PlanOptions, make_plan
from tests.brute_force import all_rings
from tests.fake_models import CHIPS, made_up_model, node
from tests.random_clusters import batches, random_case, stages_of, with_forced


@pytest.mark.parametrize("batch", batches(10, 4))
def test_every_strategy_accepts_what_fits_and_nothing_else(batch: int) -> None:
    for case in range(30):
        rng = random.Random(batch * 30 + case)
        cost = random_case(rng, max_layers=6, max_nodes=4)
        legal = None
        if rng.random() < 0.3:
            legal = frozenset(cut for cut in range(1, cost.model.num_layers) if rng.random() < 0.5)
        rings = [r for r in all_rings(cost, legal) if fits(cost, r)]
        in_order = [r for r in rings if [s.index for s in r] == sorted(s.index for s in r)]
        for strategy in STRATEGIES:
            check_strategy(cost, strategy, legal, in_order or rings, is_in_order=bool(in_order))


@pytest.mark.parametrize("batch", batches(4, 2))
def test_every_strategy_can_keep_the_order_and_be_forced(batch: int) -> None:
    for case in range(30):
        rng = random.Random(70_000 + batch * 30 + case)
        cost = random_case(rng, max_layers=6, max_nodes=4)
        cost = with_forced(rng, cost) if rng.random() < 0.4 else cost
        rings = [r for r in all_rings(cost) if [s.index for s in r] == sorted(s.index for s in r)]
        feasible = [r for r in rings if fits(cost, r)]
        least_bytes = min((over_bytes(cost, r) for r in rings), default=0)
        for strategy in STRATEGIES:
            options = PlanOptions(
                cost.work.context,
                cost.work.concurrency,
                strategy,
                rows=cost.work.rows,
                keeps_order=True,
                is_forced=True,
            )
            plan = make_plan(cost.model, cost.nodes, cost.links, options)
            assert isinstance(plan, Plan) == bool(rings), strategy
            if not isinstance(plan, Plan):
                continue
            mine = stages_of(plan, cost)
            assert mine in (feasible or rings)
            assert plan.fits == bool(feasible)
            assert over_bytes(cost, mine) == least_bytes
            if feasible and strategy != "optimal":
                assert len(mine) == max(map(len, feasible))


def over_bytes(cost: CostModel, ring: Sequence[Stage]) -> int:
    return sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in ring)


def check_strategy(
    cost: CostModel, strategy: str, legal: frozenset[int] | None, rings: list[list[Stage]], is_in_order: bool
) -> None:
    """A plan where there is one; but for `optimal` over the most nodes, in their order if that fits."""
    work = cost.work
    options = PlanOptions(work.context, work.concurrency, strategy, legal_cuts=legal, rows=work.rows)
    plan = make_plan(cost.model, cost.nodes, cost.links, options)
    assert isinstance(plan, Plan) == bool(rings), strategy
    if not isinstance(plan, Plan):
        return
    mine = stages_of(plan, cost)
    assert fits(cost, mine)
    assert legal is None or set(plan.cuts) <= legal
    if strategy == "optimal":
        return
    most = max(map(len, rings))
    assert mine in rings
    assert len(mine) == most, strategy
    if strategy == "balanced" and is_in_order:
        widest = [ring for ring in rings if len(ring) == most]
        assert slowest_ms(cost, mine) == pytest.approx(min(slowest_ms(cost, ring) for ring in widest))


def slowest_ms(cost: CostModel, ring: Sequence[Stage]) -> float:
    return max(cost.decode_ms(s.index, s.start, s.stop) for s in ring)


def fits(cost: CostModel, ring: Sequence[Stage]) -> bool:
    return not any(cost.overflow_bytes(s.index, s.start, s.stop) for s in ring)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ring_that_rounding_overfills_is_accepted(strategy: str) -> None:
    """168, 48 and 36 GB free for 48 layers of 210 GB in all: only splits near 38/10/8 fit."""
    model = made_up_model([int(4.375 * GB)] * 48)
    nodes = [node(0, 168), node(1, 48), node(2, 36)]
    plan = make_plan(model, nodes, (), PlanOptions(4096, strategy=strategy))
    assert isinstance(plan, Plan)
    assert sum(a.stop - a.start for a in plan.assignments) == 48


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_odd_number_of_layers_on_two_ranks_loses_none(strategy: str) -> None:
    plan = make_plan(
        made_up_model([GB] * 61), [node(0, 40), node(1, 40)], (), PlanOptions(256, strategy=strategy)
    )
    assert isinstance(plan, Plan)
    assert [(a.start, a.stop) for a in plan.assignments][-1][1] == 61
    assert plan.assignments[0].stop == plan.assignments[1].start


def test_a_node_that_only_slows_down_is_left_idle() -> None:
    model = made_up_model([GB // 10] * 8)
    nodes = [node(0, 10, "Apple M1"), node(1, 10, "Apple M3 Ultra")]
    plan = make_plan(model, nodes, (), PlanOptions(256))
    assert isinstance(plan, Plan)
    assert plan.unused_nodes == ("n0",)
    assert [(a.rank, a.embed, a.head) for a in plan.assignments] == [(1, True, True)]


def test_a_slow_link_changes_the_plan() -> None:
    model = made_up_model([GB // 10] * 8)
    nodes = [node(0, 10, "Apple M1"), node(1, 10, "Apple M3 Ultra")]
    slow = [Link(frozenset((0, 1)), latency_ms=250.0)]
    plan = make_plan(model, nodes, slow, PlanOptions(256))
    assert isinstance(plan, Plan)
    assert [a.rank for a in plan.assignments] == [0]


def test_throughput_splits_what_latency_does_not() -> None:
    model = made_up_model([GB] * 8)
    nodes = [node(0, 20), node(1, 20)]
    latency = make_plan(model, nodes, (), PlanOptions(256, 8))
    throughput = make_plan(model, nodes, (), PlanOptions(256, 8, objective="throughput"))
    assert isinstance(latency, Plan)
    assert isinstance(throughput, Plan)
    assert (len(latency.assignments), len(throughput.assignments)) == (1, 2)
    assert throughput.predicted.throughput_tok_s > latency.predicted.throughput_tok_s


def test_proportional_strategies_follow_their_measure() -> None:
    model = made_up_model([GB // 10] * 20)
    nodes = [node(0, 60, "Apple M1"), node(1, 20, "Apple M3 Ultra"), node(2, 20, "Apple M3 Ultra")]
    sizes = {}
    for strategy in STRATEGIES:
        plan = make_plan(model, nodes, (), PlanOptions(256, strategy=strategy))
        assert isinstance(plan, Plan)
        sizes[strategy] = [a.stop - a.start for a in plan.assignments]
    assert sizes == {
        "optimal": [20],
        "balanced": [1, 9, 10],
        "memory_proportional": [12, 4, 4],
        "compute_proportional": [1, 9, 10],
        "uniform": [6, 7, 7],
    }


def test_excluded_nodes_own_nothing() -> None:
    nodes = [node(0, 10, use=False), node(1, 10)]
    plan = make_plan(made_up_model([GB] * 3), nodes, (), PlanOptions(256, strategy="uniform"))
    assert isinstance(plan, Plan)
    assert plan.unused_nodes == ("n0",)


def test_a_tied_copy_counts_on_the_last_stage() -> None:
    model = made_up_model([GB, GB, GB], embed_bytes=GB // 2, is_tied=True)
    plan = make_plan(model, [node(0, 9), node(1, 9)], (), PlanOptions(256, strategy="uniform"))
    assert isinstance(plan, Plan)
    assert sum(a.weight_bytes for a in plan.assignments) == 4 * GB
    assert plan.memory.full_model_bytes == int(3.5 * GB)
    assert plan.memory.saved_bytes == plan.memory.full_model_bytes - max(
        a.weight_bytes for a in plan.assignments
    )


# -- forced layers ----------------------------------------------------------------------------------------
def forced(*layers: tuple[int, int] | None, budget_gb: float = 20) -> list[NodeProfile]:
    return [node(rank, budget_gb, layers=part) for rank, part in enumerate(layers)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forced_layers_are_kept(strategy: str) -> None:
    plan = make_plan(
        made_up_model([GB] * 9), forced((4, 9), None, (0, 2)), (), PlanOptions(256, strategy=strategy)
    )
    assert isinstance(plan, Plan)
    assert [(a.rank, a.start, a.stop) for a in plan.assignments] == [(2, 0, 2), (1, 2, 4), (0, 4, 9)]


def test_a_free_node_between_forced_ones_may_stay_idle() -> None:
    plan = make_plan(made_up_model([GB] * 4), forced((0, 2), None, (2, 4)), (), PlanOptions(256))
    assert isinstance(plan, Plan)
    assert plan.unused_nodes == ("n1",)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (((0, 5), (4, 9)), "layers 4:9 of n1 overlap those of n0, which end at 5"),
        (((0, 4), (5, 9)), "layers 4:5 are forced onto no node"),
        (((1, 9), (0, 1), None), None),
        (((1, 4), (5, 9)), "layers 0:1, 4:5 are forced onto no node"),
        (((0, 4), (4, 8)), "layers 8:9 are forced onto no node"),
        (((0, 10),), "layers 0:10 of n0 exceed the model, which has the layers 0:9"),
        (((0, 3), None, (4, 5), (6, 9)), "layers 3:4, 5:6 are forced onto no node"),
    ],
)
def test_forced_layers_that_do_not_tile_are_an_error(
    layers: Sequence[tuple[int, int] | None], message: str | None
) -> None:
    model = made_up_model([GB] * 9)
    if message is None:
        assert isinstance(make_plan(model, forced(*layers), (), PlanOptions(256)), Plan)
        return
    with pytest.raises(ForcedLayersError, match=message):
        make_plan(model, forced(*layers), (), PlanOptions(256))


def test_forced_layers_that_do_not_fit_are_refused_by_name() -> None:
    nodes = forced((0, 3), (3, 9), budget_gb=5)
    refusal = make_plan(made_up_model([GB] * 9), nodes, (), PlanOptions(256))
    assert isinstance(refusal, Refusal)
    assert "n1 is forced to layers 3:9, which need 6.0" in refusal.reason
    assert GB < refusal.missing_bytes < int(1.1 * GB)


@pytest.mark.parametrize(
    "bad", [{"context": 0}, {"concurrency": 0}, {"strategy": "best"}, {"objective": "speed"}]
)
def test_options_are_checked(bad: dict[str, object]) -> None:
    key = next(iter(bad))
    with pytest.raises(ValueError, match=key):
        PlanOptions(**{"context": 256, **bad})  # type: ignore[arg-type]


@pytest.mark.long
def test_a_large_cluster_is_planned_in_seconds() -> None:
    """125,673 simple cycles at 9 nodes: enumeration would explode; this is 12 nodes and 94 layers."""
    model = made_up_model([GB] * 94, embed_bytes=GB, head_bytes=GB)
    nodes = [node(rank, 9 + rank, CHIPS[rank % len(CHIPS)][0]) for rank in range(12)]
    for strategy in STRATEGIES:
        assert isinstance(make_plan(model, nodes, (), PlanOptions(4096, strategy=strategy)), Plan)
