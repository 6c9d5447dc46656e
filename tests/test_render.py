from __future__ import annotations

import re
from dataclasses import replace

import pytest

from planner.bars import Look
from planner.cost import Link
from planner.node_profile import GB, make_node, share_machine
from planner.plan import Plan, Refusal
from planner.refusal import gb
from planner.render import MEMORY_WIDTH, render_plan, render_refusal, table
from planner.sizes import done_of
from planner.solver import PlanOptions, make_plan
from tests.fake_models import made_up_model

NODES = [
    make_node(0, "mini", "a", memory_bytes=16 * GB, chip="Apple M4", gpu_cores=10),
    make_node(1, "box", "b", memory_bytes=32 * GB, chip="AMD EPYC"),
    make_node(2, "spare", "c", memory_bytes=8 * GB, chip="Apple M1", use=False),
]


def test_sizes_are_in_units_that_show_them() -> None:
    assert [gb(n) for n in (0, 2_300_000, 150_000_000, 9_990_000_000, 24 * GB)] == [
        *("0.0 MB", "2.3 MB", "0.15 GB", "9.99 GB", "24.0 GB"),
    ]


@pytest.mark.parametrize(
    ("total_bytes", "text"),
    [
        (999, "99 of 999 B"),
        (20_600, "0.10 of 20.60 kB"),
        (4_510_000, "0.00 of 4.51 MB"),
        (GB, "0.00 of 1.00 GB"),
    ],
)
def test_progress_is_in_the_unit_of_the_whole(total_bytes: int, text: str) -> None:
    assert done_of(99, total_bytes) == text


def test_columns_are_aligned() -> None:
    lines = table([{"node": "a", "weights": "1.0 GB"}, {"node": "long", "weights": "10.0 GB"}])
    assert lines == ["node  weights", "----  -------", "a      1.0 GB", "long  10.0 GB"]
    assert table([]) == []


def test_a_plan_is_a_table_with_its_promises_and_notes() -> None:
    plan = make_plan(made_up_model([GB] * 6), NODES, (), PlanOptions(4096, 2, "uniform"))
    assert isinstance(plan, Plan)
    text = render_plan(plan, NODES)
    assert text.startswith(
        "made-up: 6 layers, 2 requests of 4096 tokens, strategy uniform, objective latency, plan "
    )
    assert plan.digest in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("0 ", "1 "))]
    assert [row[:3] for row in rows] == [["0", "0", "mini"], ["1", "1", "box"]]
    assert "M4        0:3 (3)" in text
    assert "AMD EPYC  3:6 (3)" in text
    assert f"predicted: {plan.predicted.decode_tok_s:.1f} tok/s for one user" in text
    assert "note: no speed is known for AMD EPYC: a low one is assumed" in text
    assert "note: spare excluded by the config or by --exclude" in text
    assert "note: the memory limit of mini is a guess from the memory size" in text


def test_each_stage_has_a_bar_of_its_memory_and_one_of_its_time() -> None:
    links = [Link(frozenset((0, 1)), latency_ms=50.0)]
    plan = make_plan(made_up_model([GB] * 6), NODES, links, PlanOptions(4096, 2, "uniform"))
    assert isinstance(plan, Plan)
    lines = render_plan(plan, NODES).splitlines()
    key = next(i for i, line in enumerate(lines) if "# weights  = KV  - scratch  . free" in line)
    bars = {line.split()[0]: line for line in lines[key + 1 : key + 4]}
    assert set(bars) == {"mini", "box", "hops"}
    token_ms = 1e3 / plan.predicted.decode_tok_s
    for part in plan.assignments:
        _, memory, full, *_, share = bars[part.node].split()
        assert len(memory) == MEMORY_WIDTH
        assert memory.count("#") == pytest.approx(part.weight_bytes / part.budget_bytes * MEMORY_WIDTH, abs=1)
        assert full == f"{part.need_bytes / part.budget_bytes:.0%}"
        assert share == f"{part.decode_ms / token_ms:.0%}"
    assert bars["hops"].endswith("%")


def test_the_terminal_decides_how_bars_look() -> None:
    plan = make_plan(made_up_model([GB] * 6), NODES, (), PlanOptions(4096, 2, "uniform"))
    assert isinstance(plan, Plan)
    plain, blocks = render_plan(plan, NODES), render_plan(plan, NODES, look=Look(is_unicode=True))
    colored = render_plan(plan, NODES, look=Look(is_unicode=True, is_color=True))
    assert plain.isascii()
    assert blocks.translate(str.maketrans("█▓▒░", "#=-.")) == plain
    assert re.sub(r"\x1b\[\d+m", "", colored) == blocks != colored


def test_a_table_stays_narrow_whatever_the_names_are() -> None:
    nodes = [
        make_node(
            rank, f"the-studio-in-the-room-upstairs-{rank}", f"h{rank}", memory_bytes=512 * GB, chip=chip
        )
        for rank, chip in enumerate(["Apple M3 Ultra", "Apple M9 Extraordinary Maximum"] * 4)
    ]
    plan = make_plan(made_up_model([GB] * 99), nodes, (), PlanOptions(4096, 1, "uniform"))
    assert isinstance(plan, Plan)
    text = render_plan(plan, nodes, look=Look(is_unicode=True))
    bars = text.splitlines()[14:22]
    assert all("the-stud…tairs-" in line for line in bars)
    assert max(map(len, bars)) <= 80
    assert max(len(line) for line in text.splitlines()[2:22]) <= 120


def test_idle_nodes_and_shared_machines_are_noted() -> None:
    nodes = [share_machine(node, 2) for node in NODES[:2]]
    plan = make_plan(made_up_model([GB]), nodes, (), PlanOptions(256))
    assert isinstance(plan, Plan)
    text = render_plan(plan, nodes)
    assert "note: box would own no layers: a part there is slower, or does not fit" in text
    assert "note: mini, box share one machine's memory evenly" in text


def test_a_refusal_shows_the_budgets_and_what_would_help() -> None:
    refusal = make_plan(made_up_model([40 * GB]), NODES, (), PlanOptions(256))
    assert isinstance(refusal, Refusal)
    text = render_refusal(refusal, "made-up", NODES)
    assert text.startswith(
        "made-up does not fit: made-up needs 40.0 GB for its weights and 0.0 MB for one request"
    )
    assert "spare" not in text.split("note:")[0]
    assert refusal.advice in text


def test_advice_names_a_concurrency_or_context_that_fits() -> None:
    model = made_up_model([GB] * 2, kv_token_bytes=100_000)
    node = replace(NODES[1], reserve_bytes=0)
    crowded = make_plan(model, [node], (), PlanOptions(8192, 64))
    assert isinstance(crowded, Refusal)
    most = int(crowded.advice.split("--concurrency to ")[1].split(",")[0])
    assert isinstance(make_plan(model, [node], (), PlanOptions(8192, most)), Plan)
    assert isinstance(make_plan(model, [node], (), PlanOptions(8192, most + 1)), Refusal)
    long = make_plan(model, [node], (), PlanOptions(1_000_000, 1))
    assert isinstance(long, Refusal)
    most = int(long.advice.split("--context to ")[1].split(",")[0])
    assert isinstance(make_plan(model, [node], (), PlanOptions(most, 1)), Plan)
    assert isinstance(make_plan(model, [node], (), PlanOptions(most + 256, 1)), Refusal)
