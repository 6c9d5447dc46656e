"""The solver against a brute force over all subsets, orders and cuts, for every objective."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

from planner.cost import CostModel, Link, Stage
from planner.hops import hop_tables
from planner.node_profile import GB
from planner.optimal import RingSearch
from planner.plan import Plan, Refusal
from planner.solver import OBJECTIVES, PlanOptions, make_plan
from planner.workload import Workload
from tests.brute_force import Best, brute_force
from tests.fake_models import CHIPS, made_up_model, node
from tests.random_clusters import batches, random_case, stages_of, with_forced

NUM_BATCHES, BATCH = 60, 60


def check_optimal(cost: CostModel, legal: frozenset[int] | None = None, *, keeps_order: bool = False) -> None:
    """Each objective's plan has the value of the best ring; where none fits, the refusal says by how much,
    and a forced plan is the best of the rings that exceed their budgets by so much.
    """
    best = brute_force(cost, legal, keeps_order=keeps_order)
    for objective in OBJECTIVES:
        work = cost.work
        options = PlanOptions(
            work.context,
            work.concurrency,
            "optimal",
            objective,
            legal_cuts=legal,
            rows=work.rows,
            keeps_order=keeps_order,
        )
        plan = make_plan(cost.model, cost.nodes, cost.links, replace(options, is_forced=True))
        if objective == OBJECTIVES[0] or not isinstance(plan, Plan):
            plain = make_plan(cost.model, cost.nodes, cost.links, options)
            assert plain == (plan.refusal or plan if isinstance(plan, Plan) else plan)
        if best.overflow_bytes == float("inf"):
            assert isinstance(plan, Refusal)
            assert plan.missing_bytes == 0
            continue
        assert isinstance(plan, Plan)
        assert plan.fits == best.is_feasible
        assert plan.refusal is None or plan.refusal.missing_bytes == best.overflow_bytes
        check_plan(plan, cost, objective, best, legal)


def check_plan(plan: Plan, cost: CostModel, objective: str, best: Best, legal: frozenset[int] | None) -> None:
    stages = stages_of(plan, cost)
    over = [cost.overflow_bytes(s.index, s.start, s.stop) for s in stages]
    assert sum(over) == best.overflow_bytes
    assert plan.fits == (not any(over))
    assert [a.over_bytes for a in plan.assignments] == over
    assert all(cost.nodes[s.index].use for s in stages)
    assert legal is None or set(plan.cuts) <= legal
    for i, n in enumerate(cost.nodes):
        if n.use and n.layers is not None:
            assert Stage(i, *n.layers) in stages
    mine, least = {
        "latency": (1e3 / plan.predicted.decode_tok_s, best.latency_ms),
        "throughput": (1e3 / plan.predicted.throughput_tok_s, best.throughput_ms),
        "ttft": (plan.predicted.ttft_s * 1e3, best.ttft_ms),
    }[objective]
    assert mine == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize("batch", batches(NUM_BATCHES, 1))
def test_optimal_is_the_best_of_all_rings(batch: int) -> None:
    for case in range(BATCH):
        rng = random.Random(batch * BATCH + case)
        check_optimal(random_case(rng, max_layers=6, max_nodes=4))


@pytest.mark.parametrize("batch", batches(20, 1))
def test_optimal_with_legal_cuts_and_forced_layers(batch: int) -> None:
    for case in range(BATCH):
        rng = random.Random(10_000 + batch * BATCH + case)
        cost = with_forced(rng, random_case(rng, max_layers=6, max_nodes=5))
        legal = frozenset(cut for cut in range(1, cost.model.num_layers) if rng.random() < 0.6)
        check_optimal(cost, legal if rng.random() < 0.5 else None)


@pytest.mark.parametrize("batch", batches(20, 1))
def test_optimal_in_the_order_of_the_nodes(batch: int) -> None:
    for case in range(BATCH):
        rng = random.Random(50_000 + batch * BATCH + case)
        cost = random_case(rng, max_layers=6, max_nodes=5)
        if rng.random() < 0.3:
            cost = with_forced(rng, cost)
        legal = frozenset(cut for cut in range(1, cost.model.num_layers) if rng.random() < 0.6)
        check_optimal(cost, legal if rng.random() < 0.3 else None, keeps_order=True)


def test_optimal_on_more_nodes() -> None:
    for case in range(20):
        rng = random.Random(20_000 + case)
        check_optimal(random_case(rng, max_layers=5, max_nodes=6))


@pytest.mark.parametrize("batch", batches(20, 1))
def test_a_stated_gap_holds(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not every order may be searched, the plan fits and its gap bounds what the best ring gains."""
    monkeypatch.setattr("planner.optimal.MAX_STEPS", 0)
    for case in range(BATCH):
        cost = random_case(random.Random(30_000 + batch * BATCH + case), max_layers=6, max_nodes=4)
        best = brute_force(cost)
        least = {"latency": best.latency_ms, "throughput": best.throughput_ms, "ttft": best.ttft_ms}
        for objective in OBJECTIVES:
            found = RingSearch(cost, None, {}).fastest(objective)
            if found is None:
                continue
            stages = found.stages
            assert not any(cost.overflow_bytes(s.index, s.start, s.stop) for s in stages)
            mine = {
                "latency": cost.path_ms(stages),
                "throughput": 1e3 / cost.throughput_tok_s(stages),
                "ttft": cost.ttft_ms(stages),
            }[objective]
            assert mine * (1 - found.gap) * (1 - 1e-9) <= least[objective] <= mine * (1 + 1e-9)


def test_many_equal_nodes_are_searched_in_every_order() -> None:
    nodes = [node(rank, 9) for rank in range(32)]
    plan = make_plan(made_up_model([GB] * 60), nodes, (), PlanOptions(256))
    assert isinstance(plan, Plan)
    assert plan.notes == ()
    assert [a.rank for a in plan.assignments] == list(range(len(plan.assignments)))


def test_many_different_nodes_get_a_plan_with_a_stated_gap() -> None:
    nodes = [node(rank, 9 + rank / 10, CHIPS[rank % 5][0]) for rank in range(32)]
    plan = make_plan(made_up_model([GB] * 150), nodes, (), PlanOptions(256))
    assert isinstance(plan, Plan)
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("note: with 32 different nodes not every order was tried: another")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_large_clusters_are_planned_in_time(objective: str) -> None:
    """Eight nodes in any order and 100 layers take 0.3 s, 32 in one order and 200 layers as long."""
    for num_nodes, num_layers in ((8, 100), (32, 200)):
        nodes = [node(r, 2 * num_layers / num_nodes + r / 7, CHIPS[r % 5][0]) for r in range(num_nodes)]
        model = made_up_model([GB] * num_layers, embed_bytes=GB, head_bytes=GB)
        options = PlanOptions(4096, 8, objective=objective)
        started_s = time.process_time()
        assert isinstance(make_plan(model, nodes, (), options), Plan)
        assert time.process_time() - started_s < 3


def test_links_decide_the_order() -> None:
    """Four nodes that are all needed; the fast links make a ring in another order than the file's."""
    nodes = [node(rank, 3.5) for rank in range(4)]
    fast = ({0, 2}, {2, 1}, {1, 3}, {3, 0})
    links = [
        Link(frozenset(pair), latency_ms=0.1 if set(pair) in fast else 250.0)
        for pair in itertools.combinations(range(4), 2)
    ]
    plan = make_plan(made_up_model([GB] * 12), nodes, links, PlanOptions(256))
    assert isinstance(plan, Plan)
    order = [a.rank for a in plan.assignments]
    assert order in ([0, 2, 1, 3], [0, 3, 1, 2])
    assert 1e3 / plan.predicted.decode_tok_s < 250


def test_slow_links_leave_a_node_out() -> None:
    nodes = [node(0, 9), node(1, 6), node(2, 6)]
    model = made_up_model([GB] * 11)

    def used(*latencies_ms: float) -> set[int]:
        pairs = ((0, 1), (0, 2), (1, 2))
        links = [Link(frozenset(p), latency_ms=ms) for p, ms in zip(pairs, latencies_ms, strict=True)]
        plan = make_plan(model, nodes, links, PlanOptions(256))
        assert isinstance(plan, Plan)
        return {a.rank for a in plan.assignments}

    assert used(250, 0.1, 250) == {0, 2}
    assert used(0.1, 250, 250) == {0, 1}


def test_a_node_fits_at_the_byte_and_is_refused_one_below() -> None:
    model = made_up_model([GB] * 3, kv_token_bytes=1000)
    need_bytes = CostModel(model, [node(0, 1)], (), Workload(4096, 2)).need_bytes(0, 0, 3)
    exact = replace(node(0, 1), ceiling_bytes=need_bytes)
    assert isinstance(make_plan(model, [exact], (), PlanOptions(4096, 2)), Plan)
    short = replace(exact, ceiling_bytes=need_bytes - 1)
    refusal = make_plan(model, [short], (), PlanOptions(4096, 2))
    assert isinstance(refusal, Refusal)
    assert refusal.missing_bytes == 1


def test_one_byte_over_names_the_node() -> None:
    model = made_up_model([GB] * 3)
    need_bytes = CostModel(model, [node(0, 1)], (), Workload(256, 1)).need_bytes(0, 0, 2)
    nodes = [
        replace(node(0, 1, layers=(0, 2)), ceiling_bytes=need_bytes - 1, name="mini1"),
        node(1, 9, layers=(2, 3)),
    ]
    refusal = make_plan(model, nodes, (), PlanOptions(256))
    assert isinstance(refusal, Refusal)
    assert refusal.missing_bytes == 1
    assert refusal.reason.startswith("mini1 is forced to layers 0:2, which need")


def test_fewer_layers_than_nodes_leave_nodes_out() -> None:
    nodes = [node(rank, 1.2) for rank in range(5)]
    plan = make_plan(made_up_model([GB] * 3), nodes, (), PlanOptions(256))
    assert isinstance(plan, Plan)
    assert [a.rank for a in plan.assignments] == [0, 1, 2]
    assert plan.unused_nodes == ("n3", "n4")


def test_a_longer_context_moves_layers_and_then_is_refused() -> None:
    model = made_up_model([GB] * 12, kv_token_bytes=20_000)
    nodes = [node(0, 11, "Apple M3 Ultra", gpu_cores=80), node(1, 40, "Apple M1", gpu_cores=8)]
    on_fast = {}
    for context in (4096, 131_072):
        plan = make_plan(model, nodes, (), PlanOptions(context))
        assert isinstance(plan, Plan)
        on_fast[context] = sum(a.stop - a.start for a in plan.assignments if a.rank == 0)
    assert on_fast[4096] > on_fast[131_072] > 0
    refusal = make_plan(model, nodes, (), PlanOptions(1 << 20))
    assert isinstance(refusal, Refusal)
    assert "Lower --context to" in refusal.advice


def test_hop_tables_say_what_the_cost_model_says() -> None:
    for case in range(100):
        cost = random_case(random.Random(40_000 + case), max_layers=2, max_nodes=5)
        hop, busy = hop_tables(cost, 300)
        ends = [*range(len(cost.nodes)), None]
        for row, a in enumerate(ends):
            for column, b in enumerate(ends):
                assert hop[row, column] == pytest.approx(cost.hop_between_ms(a, b, 300))
                assert busy[row, column] == pytest.approx(cost.transfer_ms(a, b, 300))
