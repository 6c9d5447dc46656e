"""Every strategy against brute force: all node subsets in order, all cuts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from planner.cost import CostModel, Link, Stage, Workload
from planner.forced import ForcedLayersError
from planner.node_profile import GB, NodeProfile, make_node
from planner.plan import Plan, Refusal
from planner.solver import OBJECTIVES, STRATEGIES, PlanOptions, make_plan
from tests.fake_models import made_up_model

CHIPS = (
    ("Apple M1", 8),
    ("Apple M4", 10),
    ("Apple M4 Pro", 20),
    ("Apple M3 Ultra", 80),
    ("Apple M2 Max", 38),
)
NUM_CASES = 300


def node(rank: int, budget_gb: float, chip: str = "Apple M4", **overrides: object) -> NodeProfile:
    """A node with exactly that budget."""
    budget_bytes = int(budget_gb * GB)
    made = make_node(
        rank, f"n{rank}", f"host{rank}", chip=chip, memory_bytes=budget_bytes, ceiling_bytes=budget_bytes
    )
    return replace(made, reserve_bytes=0, **overrides)


def random_case(seed: int) -> tuple[CostModel, list[NodeProfile], list[Link], Workload]:
    """A small cluster on which a model just fits, or just does not."""
    rng = random.Random(seed)
    num_layers, num_nodes = rng.randint(1, 8), rng.randint(1, 4)
    model = made_up_model(
        [rng.randint(1, 12) * GB // 10 for _ in range(num_layers)],
        embed_bytes=rng.randint(0, 10) * GB // 10,
        head_bytes=rng.randint(0, 10) * GB // 10,
        is_tied=rng.random() < 0.3,
        kv_token_bytes=rng.choice([0, 1000, 20000]),
    )
    work = Workload(rng.choice([256, 4096, 16384]), rng.choice([1, 3, 8]))
    need_gb = CostModel(model, [node(0, 1)], (), work).need_bytes(0, 0, num_layers) / GB
    shares = [rng.random() + 0.3 for _ in range(num_nodes)]
    scale = need_gb * rng.choice([0.9, 1.1, 1.2, 1.3, 1.5, 2.0]) / sum(shares)
    nodes = [make_random_node(rng, rank, share * scale) for rank, share in enumerate(shares)]
    links = [
        Link(frozenset(pair), rng.choice([0.05, 0.5, 5.0, 250.0]), rng.choice([0.1, 10.0]))
        for pair in itertools.combinations(range(num_nodes), 2)
        if rng.random() < 0.5
    ]
    return CostModel(model, nodes, links, work), nodes, links, work


def make_random_node(rng: random.Random, rank: int, budget_gb: float) -> NodeProfile:
    chip, cores = rng.choice(CHIPS)
    return node(rank, budget_gb, chip, gpu_cores=cores, use=rng.random() < 0.9)


def all_splits(cost: CostModel, legal: frozenset[int] | None = None) -> Iterator[list[Stage]]:
    """Every way to cut the layers over some of the nodes in use, in order."""
    usable = [i for i, n in enumerate(cost.nodes) if n.use]
    num_layers = cost.model.num_layers
    for size in range(1, min(len(usable), num_layers) + 1):
        for chosen in itertools.combinations(usable, size):
            for cuts in itertools.combinations(range(1, num_layers), size - 1):
                if legal is None or set(cuts) <= legal:
                    bounds = (0, *cuts, num_layers)
                    yield [
                        Stage(i, a, b) for i, (a, b) in zip(chosen, itertools.pairwise(bounds), strict=True)
                    ]


def feasible(cost: CostModel, legal: frozenset[int] | None = None) -> list[list[Stage]]:
    return [
        s
        for s in all_splits(cost, legal)
        if not any(cost.overflow_bytes(x.index, x.start, x.stop) for x in s)
    ]


def stages_of(plan: Plan, cost: CostModel) -> list[Stage]:
    index = {n.rank: i for i, n in enumerate(cost.nodes)}
    return [Stage(index[a.rank], a.start, a.stop) for a in plan.assignments]


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_optimal_is_the_best_of_all_splits(seed: int) -> None:
    cost, nodes, links, work = random_case(seed)
    if not any(n.use for n in nodes):
        return
    splits = feasible(cost)
    for objective in OBJECTIVES:
        plan = make_plan(
            cost.model, nodes, links, PlanOptions(work.context, work.concurrency, "optimal", objective)
        )
        if not splits:
            assert isinstance(plan, Refusal)
            continue
        assert isinstance(plan, Plan)
        mine = stages_of(plan, cost)
        assert mine in splits
        if objective == "latency":
            assert cost.path_ms(mine) == pytest.approx(min(map(cost.path_ms, splits)))
            assert plan.predicted.decode_tok_s == pytest.approx(1e3 / cost.path_ms(mine))
        elif objective == "throughput":
            assert cost.throughput_tok_s(mine) == pytest.approx(max(map(cost.throughput_tok_s, splits)))
        else:
            assert cost.ttft_ms(mine) == pytest.approx(min(map(cost.ttft_ms, splits)))


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_every_strategy_accepts_what_fits_and_nothing_else(seed: int) -> None:
    cost, nodes, links, work = random_case(seed)
    if not any(n.use for n in nodes):
        return
    splits = feasible(cost)
    most = max(map(len, splits), default=0)
    for strategy in STRATEGIES:
        plan = make_plan(cost.model, nodes, links, PlanOptions(work.context, work.concurrency, strategy))
        assert isinstance(plan, Plan) == bool(splits), strategy
        if not isinstance(plan, Plan):
            continue
        assert stages_of(plan, cost) in splits
        if strategy != "optimal":
            assert len(plan.assignments) == most, strategy
        if strategy == "balanced":
            widest = [s for s in splits if len(s) == most]
            assert cost.slowest_ms(stages_of(plan, cost)) == pytest.approx(min(map(cost.slowest_ms, widest)))


@pytest.mark.parametrize("seed", range(0, NUM_CASES, 3))
def test_only_legal_cuts_are_used(seed: int) -> None:
    cost, nodes, links, work = random_case(seed)
    if not any(n.use for n in nodes):
        return
    rng = random.Random(seed + 1)
    legal = frozenset(cut for cut in range(1, cost.model.num_layers) if rng.random() < 0.5)
    splits = feasible(cost, legal)
    for strategy in STRATEGIES:
        options = PlanOptions(work.context, work.concurrency, strategy, legal_cuts=legal)
        plan = make_plan(cost.model, nodes, links, options)
        assert isinstance(plan, Plan) == bool(splits)
        assert not isinstance(plan, Plan) or set(plan.cuts) <= legal


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_missing_bytes_are_the_least_that_would_do(seed: int) -> None:
    cost, nodes, links, work = random_case(seed)
    if not any(n.use for n in nodes) or feasible(cost):
        return
    refusal = make_plan(cost.model, nodes, links, PlanOptions(work.context, work.concurrency))
    assert isinstance(refusal, Refusal)
    overflow = min(
        sum(cost.overflow_bytes(s.index, s.start, s.stop) for s in split) for split in all_splits(cost)
    )
    assert refusal.missing_bytes == overflow > 0


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


def test_a_large_cluster_is_planned_in_seconds() -> None:
    """125,673 simple cycles at 9 nodes: enumeration would explode; this is 12 nodes and 94 layers."""
    model = made_up_model([GB] * 94, embed_bytes=GB, head_bytes=GB)
    nodes = [node(rank, 9 + rank, CHIPS[rank % len(CHIPS)][0]) for rank in range(12)]
    for strategy in STRATEGIES:
        assert isinstance(make_plan(model, nodes, (), PlanOptions(4096, strategy=strategy)), Plan)
