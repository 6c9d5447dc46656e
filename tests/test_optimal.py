"""The solver against a brute force over all subsets, orders and cuts, for every objective."""

from __future__ import annotations

import random

import pytest

from planner.cost import CostModel, Stage
from planner.plan import Plan, Refusal
from planner.solver import OBJECTIVES, PlanOptions, make_plan
from tests.brute_force import Best, brute_force
from tests.random_clusters import random_case, stages_of, with_forced

NUM_BATCHES, BATCH = 20, 60


def check_optimal(cost: CostModel, legal: frozenset[int] | None = None) -> None:
    """Each objective's plan has the value of the best ring; where none fits, the refusal says by how much."""
    best = brute_force(cost, legal)
    for objective in OBJECTIVES:
        options = PlanOptions(
            cost.work.context, cost.work.concurrency, "optimal", objective, legal_cuts=legal
        )
        plan = make_plan(cost.model, cost.nodes, cost.links, options)
        if best.is_feasible:
            assert isinstance(plan, Plan)
            check_plan(plan, cost, objective, best, legal)
            continue
        assert isinstance(plan, Refusal)
        assert plan.missing_bytes == (0 if best.overflow_bytes == float("inf") else best.overflow_bytes)


def check_plan(plan: Plan, cost: CostModel, objective: str, best: Best, legal: frozenset[int] | None) -> None:
    stages = stages_of(plan, cost)
    assert not any(cost.overflow_bytes(s.index, s.start, s.stop) for s in stages)
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


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_optimal_is_the_best_of_all_rings(batch: int) -> None:
    for case in range(BATCH):
        rng = random.Random(batch * BATCH + case)
        check_optimal(random_case(rng, max_layers=6, max_nodes=4))


@pytest.mark.parametrize("batch", range(4))
def test_optimal_with_legal_cuts_and_forced_layers(batch: int) -> None:
    for case in range(BATCH):
        rng = random.Random(10_000 + batch * BATCH + case)
        cost = with_forced(rng, random_case(rng, max_layers=6, max_nodes=5))
        legal = frozenset(cut for cut in range(1, cost.model.num_layers) if rng.random() < 0.6)
        check_optimal(cost, legal if rng.random() < 0.5 else None)


def test_optimal_on_more_nodes() -> None:
    for case in range(20):
        rng = random.Random(20_000 + case)
        check_optimal(random_case(rng, max_layers=5, max_nodes=6))
