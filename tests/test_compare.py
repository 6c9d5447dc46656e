"""All strategies beside the plan; what each of them makes is test_solver.py's."""

from __future__ import annotations

import pytest

from planner.compare import compare, render_compared
from planner.node_profile import GB
from planner.plan import Plan, Refusal
from planner.solver import OBJECTIVES, STRATEGIES, PlanOptions, make_plan
from tests.fake_models import made_up_model, node

MODEL = made_up_model([GB] * 9)
NODES = [node(0, 6, "Apple M1"), node(1, 8, "Apple M3 Ultra"), node(2, 5)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_row_is_what_that_strategy_plans(strategy: str) -> None:
    options = PlanOptions(256, 4, strategy, "throughput")
    chosen = make_plan(MODEL, NODES, (), options)
    rows = compare(chosen, MODEL, NODES, (), options, is_quick=True)
    assert [(row.strategy, row.objective) for row in rows] == [
        *(("optimal", objective) for objective in OBJECTIVES),
        *((name, None) for name in STRATEGIES[1:]),
    ]
    assert [row.is_chosen for row in rows].count(True) == 1
    for row in rows:
        objective = row.objective or "throughput"
        plan = make_plan(MODEL, NODES, (), PlanOptions(256, 4, row.strategy, objective))
        assert isinstance(plan, Plan)
        assert (row.fits, row.num_stages, row.predicted) == (True, len(plan.assignments), plan.predicted)
        assert row.is_chosen == (row.strategy == strategy and row.objective in (None, "throughput"))


def test_the_table_has_a_star_at_the_plan() -> None:
    options = PlanOptions(256, strategy="uniform")
    rows = compare(make_plan(MODEL, NODES, (), options), MODEL, NODES, (), options, is_quick=True)
    header, _, *lines = render_compared(rows)
    assert header.split() == [
        *("strategy", "fits", "decode", "tok/s", "throughput", "tok/s"),
        *("first", "token", "s", "stages"),
    ]
    assert [line.split()[0] for line in lines if "*" in line] == ["uniform"]
    assert all(" yes " in line and line.endswith("3") for line in lines[3:])


def test_where_nothing_fits_no_strategy_does() -> None:
    options = PlanOptions(256, is_forced=True)
    model = made_up_model([GB] * 20)
    forced = make_plan(model, NODES, (), options)
    assert isinstance(forced, Plan)
    first, *others = compare(forced, model, NODES, (), options, is_quick=True)
    assert (first.is_chosen, first.fits, first.predicted) == (True, False, forced.predicted)
    assert all((row.fits, row.predicted) == (False, None) for row in others)
    refusal = make_plan(model, NODES, (), PlanOptions(256))
    assert isinstance(refusal, Refusal)
    assert not any(row.fits for row in compare(refusal, model, NODES, (), PlanOptions(256), is_quick=True))


def test_what_takes_long_is_left_out_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUICK_STEPS", "QUICK_RING_STEPS"):
        monkeypatch.setattr(f"planner.compare.{name}", 0)
    options = PlanOptions(256)
    chosen = make_plan(MODEL, NODES, (), options)
    assert [row.is_chosen for row in compare(chosen, MODEL, NODES, (), options, is_quick=True)] == [True]
    assert len(compare(chosen, MODEL, NODES, (), options, is_quick=False)) == 7
