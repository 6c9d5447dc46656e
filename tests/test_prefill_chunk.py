"""The chunks that a plan is given: small enough for those who write, within what is reserved."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import edge_sender
from cluster.config import load_config
from cluster.planning import Planning, plan_cluster
from cluster.ring_limits import MAX_ROWS, RingLimits
from planner import prefill_chunk
from planner.compare import compare
from planner.cost import CostModel, Link
from planner.fitting import do_fit
from planner.model_profile import ModelProfile
from planner.plan import Plan, Refusal
from planner.planned_from import PlannedFrom
from planner.prefill_chunk import (
    LARGER,
    MIN_CHUNK,
    TIE,
    PromptChunks,
    choose_chunks,
    gap_limit_ms,
    gap_ms,
    with_chunk,
)
from planner.render import render_plan
from planner.solver import OBJECTIVES, PlanOptions, make_plan
from planner.why import explain_plan, explain_refusal
from planner.workload import Workload
from shard_loader.cut_proof import NO_ROWS, RowProof
from tests.fake_models import GB, llama_config, llama_tensors, made_up_model, node, write_model
from tests.node_process import write_cluster
from tests.random_clusters import random_case, stages_of

KNOWN = {"memory_gb": 16, "chip": "Apple M4"}
USUAL = 512
FAST = "NVIDIA H200"  # launches count for much of its time


def wide(layers: int = 8, layer_bytes: int = GB // 8) -> ModelProfile:
    """A model whose scratch grows with the chunk."""
    return made_up_model([layer_bytes] * layers, hidden_size=4096, vocab_size=50_000, head_bytes=GB // 4)


def case(seed: int) -> CostModel:
    """A random cluster on which scratch matters, of chips that are fast or slow."""
    rng = random.Random(seed)
    cost = random_case(rng, 7, 4)
    model = replace(cost.model, hidden_size=rng.choice([64, 4096, 8192]), vocab_size=rng.choice([8, 100_000]))
    chip = rng.choice([FAST, None])
    nodes = [
        n if chip is None else replace(n, chip=chip, gpu_cores=None, device="cuda", measured=None)
        for n in cost.nodes
    ]
    return CostModel(model, nodes, cost.links, cost.work)


def plan_of(cost: CostModel, tokens: int | None, objective: str = "latency") -> Plan | Refusal:
    options = PlanOptions(cost.work.context, cost.work.concurrency, objective=objective, chunk_tokens=tokens)
    return make_plan(cost.model, cost.nodes, cost.links, options)


def shards(plan: Plan) -> list[tuple[int, int, int]]:
    return [(part.rank, part.start, part.stop) for part in plan.assignments]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_of_all_chunks_that_fit_the_same_shards_the_smallest_soon_enough_is_taken(objective: str) -> None:
    found = []
    for seed in range(80):
        cost = case(seed)
        plan, usual = plan_of(cost, None, objective), plan_of(cost, USUAL, objective)
        if not isinstance(usual, Plan):
            continue
        assert isinstance(plan, Plan)
        assert shards(plan) == shards(usual)
        assert plan.digest == usual.digest  # no window among them: what nodes hold is the same
        soon, late = {}, {}
        for tokens in (USUAL, *LARGER):
            other, stages = with_chunk(cost, tokens), stages_of(usual, cost)
            if do_fit(other, stages):
                soon[tokens] = other.ttft_ms(stages)
                late[tokens] = with_chunk(cost, tokens, cost.work.context).ttft_ms(stages)
        chosen = plan.chunk_tokens
        assert plan.predicted.ttft_s * 1e3 == pytest.approx(soon[chosen])
        assert soon[chosen] <= (1 + TIE) * min(soon.values())
        near = [tokens for tokens in soon if soon[tokens] <= (1 + TIE) * min(soon.values())]
        least_ms = min(late[tokens] for tokens in near)
        assert chosen in near
        assert all(late[n] > (1 + TIE) * least_ms for n in near if n < chosen)
        assert all(part.over_bytes == 0 for part in plan.assignments)
        found.append(chosen)
    assert set(found) == {USUAL, *LARGER}


def test_for_the_first_token_each_chunk_has_the_best_ring_of_its_own() -> None:
    found = []
    for seed in range(60):
        cost = case(seed)
        plan = plan_of(cost, None, "ttft")
        others = {tokens: plan_of(cost, tokens, "ttft") for tokens in (USUAL, *LARGER)}
        best = {n: other.predicted.ttft_s for n, other in others.items() if isinstance(other, Plan)}
        if USUAL not in best:
            continue
        assert isinstance(plan, Plan)
        chosen = others[plan.chunk_tokens]
        assert isinstance(chosen, Plan)
        assert plan.predicted.ttft_s == pytest.approx(chosen.predicted.ttft_s)
        assert plan.predicted.ttft_s <= (1 + TIE) * min(best.values()) * (1 + 1e-9)
        found.append(plan.chunk_tokens)
    assert set(found) == {USUAL, *LARGER}


def test_a_budget_that_shrinks_takes_smaller_chunks_and_is_refused_at_last() -> None:
    model = wide()
    cost = CostModel(model, [node(0, 64, FAST)], (), Workload(8192, 1))
    needs = {n: with_chunk(cost, n).need_bytes(0, 0, model.num_layers) for n in (USUAL, *LARGER)}
    assert sorted(needs.values()) == [needs[n] for n in sorted(needs)]
    for tokens in sorted(needs):
        for spare, expected in ((0, tokens), (-1, max((n for n in needs if n < tokens), default=None))):
            held = replace(node(0, 64, FAST), reserve_bytes=0, ceiling_bytes=needs[tokens] + spare)
            plan = make_plan(model, [held], (), PlanOptions(8192, chunk_tokens=None))
            if expected is None:
                assert isinstance(plan, Refusal)
                assert plan.missing_bytes == 1
                options = PlanOptions(8192, chunk_tokens=None)
                assert [r.kind for r in explain_refusal(model, [held], options)]
            else:
                assert isinstance(plan, Plan)
                assert plan.chunk_tokens == expected
                assert plan.assignments[0].need_bytes == needs[expected] <= held.budget_bytes


def test_a_chunk_that_is_chosen_refuses_and_accepts_what_the_usual_one_does() -> None:
    found = set()
    for seed in range(100):
        cost = case(seed)
        plan, usual = plan_of(cost, None), plan_of(cost, USUAL)
        assert isinstance(plan, Plan) == isinstance(usual, Plan)
        assert isinstance(plan, Plan) or plan == usual
        found.add(isinstance(plan, Plan))
    assert found == {True, False}


@pytest.mark.parametrize(
    ("chip", "num", "expected"),
    [
        (FAST, 1, 2048),
        (FAST, 5, USUAL),  # five stages wait for less
        ("Apple M4", 1, USUAL),  # arithmetic binds it: 2048 would gain less than TIE
        ("Apple M4", 5, USUAL),
        ("NVIDIA Nobody Knows", 1, USUAL),
        (None, 1, USUAL),
    ],
)
def test_a_chip_has_the_chunk_that_is_worth_it(chip: str | None, num: int, expected: int) -> None:
    model = wide(30, GB // 4)
    nodes = [
        replace(node(i, 64, chip or "Apple M4"), chip=chip, layers=(6 * i, 6 * i + 6) if num > 1 else None)
        for i in range(num)
    ]
    plan = make_plan(model, nodes, (), PlanOptions(8192, chunk_tokens=None))
    assert isinstance(plan, Plan)
    assert len(plan.assignments) == num
    assert plan.chunk_tokens == expected


def test_a_number_of_the_user_is_taken_as_it_is() -> None:
    plan = make_plan(wide(), [node(0, 64, FAST)], (), PlanOptions(8192, chunk_tokens=700))
    assert isinstance(plan, Plan)
    assert plan.chunk_tokens == 700


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("num_stages", "streams", "expected"),
    [(1, 40, 2048), (2, 7, 2048), (2, 9, 1024), (4, 3, 2048), (4, 5, 1024), (8, 5, USUAL)],
)
def test_a_chunk_is_no_larger_than_may_wait_before_a_stage(
    objective: str, num_stages: int, streams: int, expected: int
) -> None:
    """Of a model with `streams` hidden states of 8 KiB side by side; 2 stages have 4 chunks under way."""
    num_layers = 16
    cuts = (0, *[streams * 8192] * (num_layers - 1), 0)
    model = replace(wide(num_layers, GB // 100), cut_bytes=cuts)  # launches are most of its time
    size = num_layers // num_stages
    forced = [(at, at + size) for at in range(0, num_layers, size)]
    nodes = [node(i, 64, FAST, layers=part) for i, part in enumerate(forced)]
    links = [Link(frozenset(pair), 0.05, 1e5) for pair in itertools.combinations(range(num_stages), 2)]
    plan = make_plan(model, nodes, links, PlanOptions(8192, objective=objective, chunk_tokens=None))
    assert isinstance(plan, Plan)
    assert len(plan.assignments) == num_stages
    assert plan.chunk_tokens == expected


def test_what_may_wait_before_a_stage_is_what_its_edge_bears() -> None:
    assert prefill_chunk.MAX_WAITING_BYTES == edge_sender.MAX_WAITING_BYTES


def test_what_is_told_of_a_plan_counts_its_chunk() -> None:
    model, nodes = wide(), [node(i, 64, FAST) for i in range(2)]
    for objective in OBJECTIVES:
        options = PlanOptions(8192, objective=objective, chunk_tokens=None)
        plan = make_plan(model, nodes, (), options)
        assert isinstance(plan, Plan)
        assert plan.chunk_tokens > USUAL
        assert Plan.from_json(plan.to_json()) == plan
        assert json.loads(plan.to_json())["prefill_chunk"] == plan.chunk_tokens
        assert f"read in chunks of {plan.chunk_tokens} tokens" in render_plan(plan, nodes)
        rows = compare(plan, model, nodes, (), options, is_quick=False)
        by_objective = {row.objective: row.predicted for row in rows if row.strategy == "optimal"}
        for other in OBJECTIVES:
            same = make_plan(model, nodes, (), replace(options, objective=other))
            assert isinstance(same, Plan)
            assert by_objective[other] == same.predicted
        assert explain_plan(plan, model, nodes, (), options).reasons
        made_from = PlannedFrom(model, tuple(nodes), (), options)
        assert PlannedFrom.from_plain(json.loads(made_from.to_json())) == made_from


def test_the_head_runs_the_chunk_of_its_plan(tmp_path: Path, model: Path) -> None:
    planning = planned(tmp_path, model)
    assert planning.plan is not None
    assert planning.plan.chunk_tokens > USUAL  # launches are most of what so small a model takes
    assert planning.chunks.alone == planning.plan.chunk_tokens
    limits = RingLimits(planning.plan, planning.model, NO_ROWS, planning.chunks).limits([])
    assert limits.prefill_chunk == planning.plan.chunk_tokens
    predicted = planning.predicted[0].activation_bytes
    usual = planned(tmp_path, model, prefill_chunk=USUAL)
    assert predicted == planning.plan.assignments[0].activation_bytes > usual.predicted[0].activation_bytes


def test_a_chunk_keeps_the_gap_within_its_limit_and_twice_as_many_tokens_would_not() -> None:
    found = []
    for seed in range(60):
        cost = random_case(random.Random(seed), 9, 6)
        plan = make_plan(
            cost.model, cost.nodes, cost.links, PlanOptions(cost.work.context, cost.work.concurrency)
        )
        if not isinstance(plan, Plan):
            continue
        chunks = choose_chunks(cost, plan)
        found.append(chunks.shared)
        assert chunks.alone == 512
        assert MIN_CHUNK <= chunks.shared <= 512
        if chunks.shared > MIN_CHUNK:
            assert gap_ms(cost, plan, chunks.shared) <= gap_limit_ms(plan)
        if chunks.shared < chunks.alone:
            assert gap_ms(cost, plan, 2 * chunks.shared) > gap_limit_ms(plan)
    assert len(set(found)) > 2


def test_a_slow_chip_reads_smaller_chunks_beside_answers() -> None:
    model = made_up_model([GB // 2] * 8)
    chunks = []
    for chip in ("Apple M3 Ultra", "NVIDIA H200"):
        nodes = [replace(node(rank, 32), chip=chip) for rank in range(2)]
        cost = CostModel(model, nodes, (), Workload(8192, 4))
        plan = make_plan(model, nodes, (), PlanOptions(8192, 4))
        assert isinstance(plan, Plan)
        chunks.append(choose_chunks(cost, plan).shared)
    assert chunks[0] < chunks[1]


def test_a_chunk_for_company_is_not_larger_than_one_alone() -> None:
    with pytest.raises(ValueError, match="shared = 9 must be from 1 to alone = 8"):
        PromptChunks(8, 9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "llama", llama_config(5), llama_tensors(5))


def planned(tmp_path: Path, model: Path, **values: object) -> Planning:
    places = [{"host": "127.0.0.1", "port": 5000 + i, **KNOWN} for i in range(2)]
    config = load_config(write_cluster(tmp_path, model, *places, context=4096, **values))
    return plan_cluster(config, model, {0: None, 1: None})


def test_what_the_file_says_is_what_a_frame_carries_and_what_is_reserved(tmp_path: Path, model: Path) -> None:
    small, usual, large = (planned(tmp_path, model, prefill_chunk=tokens) for tokens in (48, 512, 2048))
    assert small.chunks == PromptChunks(48, 48)
    assert large.chunks == PromptChunks(2048, 2048)
    assert usual.chunks.alone == 512
    scratch = [
        sum(part.activation_bytes for part in planning.plan.assignments)
        for planning in (small, usual, large)
        if planning.plan is not None
    ]
    assert scratch == sorted(set(scratch))


@pytest.mark.parametrize(
    ("rows", "max_batch_size", "expected"),
    [
        (RowProof(batched=True, forked=True, rewound=True, read_together=True), None, MAX_ROWS),
        (RowProof(batched=True, forked=True, rewound=True, read_together=True), 5, 5),
        (RowProof(batched=True, forked=True, rewound=True, read_together=True), 1, 1),
        (NO_ROWS, 5, 1),
    ],
)
def test_rows_of_a_frame(
    tmp_path: Path, model: Path, rows: RowProof, max_batch_size: int | None, expected: int
) -> None:
    planning = planned(tmp_path, model)
    assert planning.plan is not None
    chunks = PromptChunks(256, 64)
    limits = RingLimits(planning.plan, planning.model, rows, chunks, max_batch_size).limits([])
    assert limits.max_rows == expected
    assert limits.reads_together is (expected > 1)
    assert (limits.prefill_chunk, limits.shared_chunk) == (256, 64)
