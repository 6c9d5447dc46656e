"""What measured links cost in tokens per second, against the planner's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.links import Pair
from cluster.links_cost import LinksCost, cost_lines, links_cost, with_measured
from planner.cost import CostModel, Link, Stage
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.solver import PlanOptions, make_plan
from planner.workload import Workload
from tests.fake_models import made_up_model, node
from tests.measured_links import pair, path, three_nodes

MODEL = made_up_model([10**8] * 12)
NODES = [node(rank, 12) for rank in range(3)]
WIFI = path(62.0, 0.2, kind="wifi", interface="en0")


def cost_of(*pairs: Pair, strategy: str = "uniform") -> LinksCost:
    """Of a plan over all three nodes, or of the best one; a new one would be the best."""
    plan = make_plan(MODEL, NODES, [], PlanOptions(1024, 1, strategy))
    assert isinstance(plan, Plan)
    assert strategy == "optimal" or len(plan.assignments) == 3
    return links_cost(plan, PlannedFrom(MODEL, tuple(NODES), (), PlanOptions(1024)), pairs)


def test_measured_links_take_the_place_of_the_configs(tmp_path: Path) -> None:
    config = three_nodes(tmp_path)
    old, other = Link(frozenset((0, 1)), 9.0, 1.0), Link(frozenset((1, 2)), 8.0, 1.0)
    found = with_measured([old, other], [pair(config, 1, 0, path(1.0, 10.0)), pair(config, 0, 2, "off")])
    assert found == [Link(frozenset((0, 1)), 0.5, 10.0), other]


def test_wifi_costs_what_the_cost_model_says(tmp_path: Path) -> None:
    found = cost_of(pair(three_nodes(tmp_path), 0, 1, WIFI))
    model = CostModel(MODEL, NODES, [Link(frozenset((0, 1)), 31.0, 0.2)], Workload(1024, 1))
    plan = make_plan(MODEL, NODES, [], PlanOptions(1024, 1, "uniform"))
    assert isinstance(plan, Plan)
    stages = [Stage(a.rank, a.start, a.stop) for a in plan.assignments]
    assert found.measured.decode_tok_s == pytest.approx(1e3 / model.path_ms(stages))
    assert found.assumed.decode_tok_s == pytest.approx(plan.predicted.decode_tok_s)
    (one,) = found.wifi
    assert one.wired.decode_tok_s == pytest.approx(found.assumed.decode_tok_s), "a cable is the default"


def test_the_warning_names_the_pair_the_interface_and_both_speeds(tmp_path: Path) -> None:
    found = cost_of(pair(three_nodes(tmp_path), 0, 1, WIFI))
    wired, slow = found.wifi[0].wired.decode_tok_s, found.measured.decode_tok_s
    assert wired > 2 * slow
    assert cost_lines(found, 1)[1] == (
        "warning: mini1 - mini2 goes over Wi-Fi (en0): 31 ms one way; by cable (0.5 ms) this plan would give "
        f"{wired:.1f} tok/s instead of {slow:.1f} tok/s"
    )
    assert "users)" in cost_lines(found, 4)[1]


def test_a_wifi_that_costs_nothing_is_said_to(tmp_path: Path) -> None:
    found = cost_of(pair(three_nodes(tmp_path), 0, 1, path(1.0, 10.0, kind="wifi")))
    assert cost_lines(found, 1)[1].endswith("0.5 ms one way; this plan would gain little by a cable there")


def test_a_better_plan_for_the_measured_links_is_told(tmp_path: Path) -> None:
    found = cost_of(pair(three_nodes(tmp_path), 0, 1, WIFI))
    assert found.better is not None
    assert found.better.decode_tok_s > 1.03 * found.measured.decode_tok_s
    assert cost_lines(found, 1)[-1] == (
        f"a plan made for these links could give {found.better.decode_tok_s:.1f} tok/s: write them with "
        "--write, copy the file to all nodes and restart them"
    )


def test_links_as_expected_change_nothing(tmp_path: Path) -> None:
    config = three_nodes(tmp_path)
    pairs = [pair(config, a, b, path(1.0, 10.0)) for a, b in ((0, 1), (0, 2), (1, 2))]
    found = cost_of(*pairs, strategy="optimal")
    assert found.better is None
    assert found.measured == found.assumed
    assert len(cost_lines(found, 1)) == 1
