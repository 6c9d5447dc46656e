"""Whether any order fits, against a brute force and on clusters of many different nodes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from planner.cost import CostModel
from planner.feasible import find_order, reach_of
from planner.node_profile import GB
from planner.optimal import RingSearch
from planner.plan import Plan, Refusal
from planner.solver import STRATEGIES, PlanOptions, make_plan
from planner.workload import Workload
from tests.brute_force import brute_force
from tests.fake_models import made_up_model, node
from tests.random_clusters import random_case, with_forced
from tests.test_optimal import batches

BATCH = 50


@pytest.mark.parametrize("batch", batches(30, 1))
def test_what_fits_is_placed_and_nothing_else(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no search of all orders is allowed, every strategy finds a ring if there is one, and says so."""
    monkeypatch.setattr("planner.optimal.MAX_STEPS", 0)
    for case in range(BATCH):
        rng = random.Random(60_000 + batch * BATCH + case)
        cost = random_case(rng, max_layers=6, max_nodes=5)
        if rng.random() < 0.3:
            cost = with_forced(rng, cost)
        legal = None
        if rng.random() < 0.3:
            legal = frozenset(cut for cut in range(1, cost.model.num_layers) if rng.random() < 0.6)
        is_feasible = brute_force(cost, legal).is_feasible
        for strategy in STRATEGIES:
            options = PlanOptions(
                cost.work.context, cost.work.concurrency, strategy, legal_cuts=legal, rows=cost.work.rows
            )
            plan = make_plan(cost.model, cost.nodes, cost.links, options)
            assert isinstance(plan, Plan) == is_feasible
            assert isinstance(plan, Plan) or "may fit after all" not in plan.reason


def tight_cluster(num_nodes: int, num_layers: int, share: float) -> CostModel:
    """Different nodes whose budgets are `share` of what the whole model needs in one piece."""
    rng = random.Random(num_nodes * 1000 + num_layers)
    model = made_up_model(
        [rng.randint(5, 15) * GB // 10 for _ in range(num_layers)], embed_bytes=GB, head_bytes=GB
    )
    work = Workload(4096, 4)
    need_gb = CostModel(model, [node(0, 1)], (), work).need_bytes(0, 0, num_layers) / GB
    sizes = [rng.uniform(0.5, 1.5) for _ in range(num_nodes)]
    nodes = [node(rank, need_gb * share * size / sum(sizes)) for rank, size in enumerate(sizes)]
    return CostModel(model, nodes, (), work)


def planned(cost: CostModel) -> Plan | Refusal:
    return make_plan(cost.model, cost.nodes, (), PlanOptions(cost.work.context, cost.work.concurrency))


def test_many_different_nodes_that_just_fit_are_placed() -> None:
    for num_nodes, num_layers, share in ((16, 60, 1.06), (20, 40, 1.10), (32, 80, 1.08)):
        assert isinstance(planned(tight_cluster(num_nodes, num_layers, share)), Plan)


def test_a_refusal_of_many_different_nodes_says_whether_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.feasible.MAX_STATES", (100,))
    refusal = planned(tight_cluster(32, 200, 0.99))
    assert isinstance(refusal, Refusal)
    assert refusal.reason.endswith(" are missing")
    assert "and at most " in refusal.reason
    unproven = planned(tight_cluster(32, 60, 1.03))
    assert isinstance(unproven, Refusal)
    assert unproven.reason.endswith("; not every order of the nodes could be tried, so one may fit after all")


def test_many_different_nodes_can_be_forced() -> None:
    """The plan exceeds the budgets by as much as the refusal says, which another order found."""
    cost = tight_cluster(16, 30, 0.95)
    refusal = planned(cost)
    assert isinstance(refusal, Refusal)
    forced = make_plan(
        cost.model, cost.nodes, (), PlanOptions(cost.work.context, cost.work.concurrency, is_forced=True)
    )
    assert isinstance(forced, Plan)
    assert forced.refusal == refusal
    assert sum(part.over_bytes for part in forced.assignments) == refusal.missing_bytes
    in_file_order = RingSearch(cost, None, {}, keeps_order=True).least_overflow()
    assert in_file_order is not None
    assert refusal.missing_bytes < sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in in_file_order)


def test_few_states_find_what_is_easy_and_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.feasible.MAX_STATES", (1,))
    reach = {i: np.array([i + 1, 3, 3, 3]) for i in range(2)}
    assert find_order(reach, (), np.array([[0.0, 1, 2, 3]])).order is not None
    cost = tight_cluster(16, 60, 1.02)
    rings = RingSearch(cost, None, {})
    assert rings.feasibility.order is None
    assert not rings.feasibility.is_proven


def test_reach_is_only_told_of_nodes_that_can_hold_each_part_of_what_they_can() -> None:
    fits = np.triu(np.ones((4, 4), dtype=np.bool_), 1)
    fits[0, 3] = False
    found = reach_of(fits)
    assert found is not None
    assert found.tolist() == [2, 3, 3, 3]
    fits[0, 1] = False
    assert reach_of(fits) is None
