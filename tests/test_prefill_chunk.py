"""The chunks that a plan is given: small enough for those who write, within what is reserved."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.planning import Planning, plan_cluster
from cluster.ring_limits import MAX_ROWS, RingLimits
from planner.cost import CostModel
from planner.plan import Plan
from planner.prefill_chunk import MIN_CHUNK, PromptChunks, choose_chunks, gap_limit_ms, gap_ms
from planner.solver import PlanOptions, make_plan
from planner.workload import Workload
from shard_loader.cut_proof import NO_ROWS, RowProof
from tests.fake_models import GB, llama_config, llama_tensors, made_up_model, node, write_model
from tests.node_process import write_cluster
from tests.random_clusters import random_case

KNOWN = {"memory_gb": 16, "chip": "Apple M4"}


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
    for chip in ("Apple M1", "Apple M3 Ultra"):
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
    small, usual, large = (
        planned(tmp_path, model, prefill_chunk=tokens)
        for tokens in (48, 512, 2048)
    )
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
