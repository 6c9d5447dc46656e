"""Properties of every plan and every refusal, on clusters that hypothesis makes up.

Feasibility is that of a brute force over all rings; what a plan says is reckoned once more by
tests/own_reckoning.py. The thousands of cases of `pytest -m long` are more of the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.cost import CostModel, Link, Stage
from planner.forced import ForcedLayersError
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.render import render_plan
from planner.solver import OBJECTIVES, STRATEGIES, PlanOptions, make_plan
from tests.brute_force import all_rings
from tests.fake_models import CHIPS, made_up_model, node
from tests.own_reckoning import Reckoning
from tests.random_clusters import stages_of

MB = 10**6
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@dataclass(frozen=True)
class Case:
    cost: CostModel
    options: PlanOptions

    def plan(self, **changes: Any) -> Plan | Refusal:
        cost = self.cost
        return make_plan(cost.model, cost.nodes, cost.links, replace(self.options, **changes))

    def with_nodes(self, nodes: list[NodeProfile]) -> Case:
        return Case(CostModel(self.cost.model, nodes, self.cost.links, self.options.work), self.options)


@st.composite
def cases(draw: st.DrawFn, max_layers: int = 6, max_nodes: int = 4, *, with_cuts: bool = True) -> Case:
    """A cluster whose memory is about what the model needs."""
    num_layers = draw(st.integers(1, max_layers))
    num_nodes = draw(st.integers(1, max_nodes))
    model = made_up_model(
        draw(st.lists(st.integers(1, 900), min_size=num_layers, max_size=num_layers).map(_as_mb)),
        embed_bytes=draw(st.integers(0, 500)) * MB,
        head_bytes=draw(st.integers(0, 500)) * MB,
        is_tied=draw(st.booleans()),
        kv_token_bytes=draw(st.sampled_from([0, 1000, 20_000])),
        hidden_size=draw(st.sampled_from([64, 4096])),
    )
    context, users = draw(st.sampled_from([2, 256, 5000])), draw(st.sampled_from([1, 3]))
    legal = None
    if with_cuts and draw(st.booleans()):
        legal = frozenset(draw(st.sets(st.integers(1, num_layers), max_size=num_layers)))
    options = PlanOptions(
        context,
        users,
        draw(st.sampled_from(STRATEGIES)),
        draw(st.sampled_from(OBJECTIVES)),
        legal,
        rows=draw(st.sampled_from([1, 1, 4])),
    )
    whole = CostModel(model, [node(0, 1)], (), options.work).need_bytes(0, 0, num_layers)
    shares = draw(st.lists(st.floats(0.3, 1.3), min_size=num_nodes, max_size=num_nodes))
    forced = _forced(draw, num_layers, num_nodes) if with_cuts else {}
    nodes = [
        replace(
            node(rank, share * whole / 1e9, draw(st.sampled_from(CHIPS))[0]),
            host=draw(st.sampled_from(["a", "b", f"host{rank}"])),
            use=rank in forced or draw(st.integers(0, 9)) > 0,
            layers=forced.get(rank),
        )
        for rank, share in enumerate(shares)
    ]
    links = [
        Link(frozenset(pair), draw(st.sampled_from([None, 0.05, 250.0])), draw(st.sampled_from([None, 0.1])))
        for pair in itertools.combinations(range(num_nodes), 2)
        if draw(st.booleans())
    ]
    return Case(CostModel(model, nodes, links, options.work), options)


def _as_mb(sizes: list[int]) -> list[int]:
    return [size * MB for size in sizes]


def _forced(draw: st.DrawFn, num_layers: int, num_nodes: int) -> dict[int, tuple[int, int]]:
    """At times one range on one node, which others can complete."""
    if num_nodes < 3 or draw(st.integers(0, 3)):
        return {}
    start = draw(st.integers(0, num_layers - 1))
    return {draw(st.integers(0, num_nodes - 1)): (start, draw(st.integers(start + 1, num_layers)))}


def least_overflow(case: Case) -> int | None:
    """Over all rings; None where there is no ring at all."""
    cost = case.cost
    over = (
        sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in ring)
        for ring in all_rings(cost, case.options.legal_cuts)
    )
    return min(over, default=None)


def check_case(case: Case) -> None:
    """What fits is placed, what does not is refused with the least that is missing."""
    try:
        result = case.plan()
    except ForcedLayersError:
        assume(False)
    least = least_overflow(case)
    cost = case.cost
    if least == 0:
        assert isinstance(result, Plan)
        Reckoning(cost.model, cost.nodes, cost.links, case.options).check(result)
        return
    assert isinstance(result, Refusal)
    assert result.missing_bytes == (least or 0)
    assert result.reason
    assert result.advice.endswith(".")


def check_bytes(case: Case) -> None:
    """A plan's stages fit budgets of exactly their bytes, and no stage fits one byte less."""
    plan = case.plan()
    assume(isinstance(plan, Plan))
    assert isinstance(plan, Plan)
    cost = case.cost
    by_index = {stage.index: stage for stage in stages_of(plan, cost)}
    exact = [_holding(cost, i, by_index.get(i)) for i in range(len(cost.nodes))]
    tight = case.with_nodes(exact).plan()
    assert isinstance(tight, Plan)
    assert all(part.need_bytes == part.budget_bytes for part in tight.assignments)
    for i, stage in by_index.items():
        short = [*exact]
        short[i] = replace(short[i], ceiling_bytes=short[i].ceiling_bytes - 1)
        refusal = case.with_nodes(short).plan()
        assert isinstance(refusal, Refusal)
        assert refusal.missing_bytes == 1
        name = cost.nodes[i].name
        assert f"{name} is forced to layers {stage.start}:{stage.stop}, which need " in refusal.reason
        assert refusal.reason.endswith(": 1 byte is missing")


def _holding(cost: CostModel, index: int, stage: Stage | None) -> NodeProfile:
    """The node forced to its stage with exactly the memory for it; out of use without one."""
    one = cost.nodes[index]
    if stage is None:
        return replace(one, use=False, layers=None)
    need_bytes = cost.need_bytes(index, stage.start, stage.stop)
    return replace(one, layers=(stage.start, stage.stop), ceiling_bytes=need_bytes, cap_bytes=None)


def check_free_bytes(case: Case) -> None:
    """The same without forced layers: one byte less, and another ring fits or the brute force says none."""
    plan = case.plan()
    assume(isinstance(plan, Plan))
    assert isinstance(plan, Plan)
    cost = case.cost
    by_index = {stage.index: stage for stage in stages_of(plan, cost)}
    exact = [replace(_holding(cost, i, by_index.get(i)), layers=None) for i in range(len(cost.nodes))]
    assert isinstance(case.with_nodes(exact).plan(), Plan)
    for i in by_index:
        short = [*exact]
        short[i] = replace(short[i], ceiling_bytes=short[i].ceiling_bytes - 1)
        check_case(case.with_nodes(short))
        result = case.with_nodes(short).plan()
        if isinstance(result, Refusal):
            assert result.missing_bytes == 1
            assert "1 byte is missing" in result.reason
            assert any(one.use and one.name in result.reason for one in short)


def check_few_layers(case: Case) -> None:
    """More nodes than layers: those without are named, and said to own none."""
    plan = case.plan()
    assume(isinstance(plan, Plan) and len(case.cost.nodes) > case.cost.model.num_layers)
    assert isinstance(plan, Plan)
    idle = set(plan.unused_nodes)
    assert len(idle) >= len(case.cost.nodes) - case.cost.model.num_layers
    text = render_plan(plan, case.cost.nodes)
    for one in case.cost.nodes:
        if one.name in idle:
            lines = [line for line in text.splitlines() if one.name in line]
            wanted = "own no layers" if one.use else "excluded by the config"
            assert any(wanted in line for line in lines)


def check_context(case: Case) -> None:
    """A longer context never fits where a shorter does not, and misses at least as many bytes."""
    results = []
    for context in (4096, 131_072):
        options = replace(case.options, context=context)
        cost = CostModel(case.cost.model, case.cost.nodes, case.cost.links, options.work)
        check_case(Case(cost, options))
        results.append(Case(cost, options).plan())
    if isinstance(results[0], Refusal):
        assert isinstance(results[1], Refusal)
        assert results[1].missing_bytes >= results[0].missing_bytes


CHECKS: tuple[tuple[Callable[[Case], None], dict[str, Any], int], ...] = (
    (check_case, {}, 150),
    (check_bytes, {"with_cuts": False}, 40),
    (check_free_bytes, {"with_cuts": False, "max_layers": 4, "max_nodes": 3}, 40),
    (check_few_layers, {"with_cuts": False, "max_layers": 3, "max_nodes": 5}, 60),
    (check_context, {"max_layers": 5}, 40),
)


def _name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("check", "shape", "count"), CHECKS, ids=_name)
def test_properties(check: Callable[[Case], None], shape: dict[str, Any], count: int) -> None:
    _examine(check, shape, count)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("check", "shape", "count"), CHECKS, ids=_name)
def test_properties_on_thousands(check: Callable[[Case], None], shape: dict[str, Any], count: int) -> None:
    _examine(check, shape, 60 * count, derandomize=False)


def _examine(check: Callable[[Case], None], shape: dict[str, Any], count: int, **more: Any) -> None:
    @settings(max_examples=count, **(QUIET | more))
    @given(case=cases(**shape))
    def examine(case: Case) -> None:
        check(case)

    examine()
