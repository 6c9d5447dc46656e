"""Orders of many nodes: what moving them finds, and what bounds it. Gaps are test_optimal.py's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.any_order import Ring
from planner.bands import band_by_start, band_by_stop, width_of
from planner.goals import Goal, goal_of
from planner.node_profile import GB
from planner.one_order import cheapest_in_order
from planner.optimal import RingSearch
from planner.plan import Plan
from planner.relaxed import relax
from planner.reorder import _moved, _Trials, reorder
from planner.solver import OBJECTIVES, PlanOptions, make_plan
from tests.benchmarks.solver import cluster
from tests.fake_models import made_up_model, node
from tests.random_clusters import random_case


def latency(rng: random.Random) -> tuple[Ring, Goal]:
    rings = RingSearch(random_case(rng, max_layers=8, max_nodes=6), None, {})
    goal = goal_of(rings.tables, "latency")
    return replace(rings.ring, stage=goal.stage, hop=goal.hop), goal


def test_costs_of_moved_orders_are_those_of_a_whole_search() -> None:
    for case in range(60):
        rng = random.Random(case)
        ring, _ = latency(rng)
        if len(ring.free) < 2:
            continue
        trials = _Trials(ring, ring.free)
        order = list(range(len(ring.free)))
        trials.cost(order, 0)
        trials.keep()
        for _ in range(10):
            moved = _moved(rng, order)
            assert sorted(moved) == sorted(order)
            first = next(
                (p for p, pair in enumerate(zip(order, moved, strict=True)) if pair[0] != pair[1]), 0
            )
            found = cheapest_in_order(ring, [ring.free[p] for p in moved])
            assert trials.cost(moved, first) == pytest.approx(found[0] if found else float("inf"))


def test_a_moved_order_is_never_worse_and_always_the_same() -> None:
    for case in range(20):
        ring, _ = latency(random.Random(case))
        found = cheapest_in_order(ring, ring.free)
        if found is None:
            continue
        order = reorder(ring, ring.free)
        assert sorted(order) == sorted(ring.free)
        assert order == reorder(ring, ring.free)
        better = cheapest_in_order(ring, order)
        assert better is not None
        assert better[0] <= found[0] * (1 + 1e-9)


def test_bands_hold_every_stage() -> None:
    ring, _ = latency(random.Random(3))
    for i in ring.free:
        table = ring.stage(i)
        by_start, by_stop = (band(table, width_of(table)) for band in (band_by_start, band_by_stop))
        for start in range(ring.size):
            for w in range(min(width_of(table), ring.size - 1 - start)):
                assert by_start[start, w] == by_stop[start + 1 + w, w] == table[start, start + 1 + w]


def test_many_nodes_with_their_own_links_are_not_relaxed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the fluid bound alone, and a plan."""
    ring, goal = latency(random.Random(1))
    assert relax(ring, goal) is not None
    monkeypatch.setattr("planner.relaxed.MAX_BAND_ELEMENTS", 0)
    assert relax(ring, goal) is None
    nodes = [node(rank, 9 + rank / 10) for rank in range(24)]
    plan = make_plan(made_up_model([GB] * 100), nodes, (), PlanOptions(256))
    assert isinstance(plan, Plan)


@pytest.mark.parametrize(
    "objective", ["latency", *(pytest.param(o, marks=[pytest.mark.long]) for o in OBJECTIVES[1:])]
)
def test_the_gap_of_a_large_cluster_is_small(objective: str) -> None:
    """32 nodes, all different, with links of 0.1 to 8 ms, and 200 layers."""
    model, nodes, links = cluster(32, 200, False)
    plan = make_plan(model, nodes, links, PlanOptions(8192, 8, objective=objective))
    assert isinstance(plan, Plan)
    (note,) = plan.notes
    assert float(note.split(" by ")[1].split("%")[0]) < 15
