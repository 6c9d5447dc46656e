"""Pictures as values: what is in them, where, and that bars add up."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from planner.cost import CostModel, Link
from planner.node_profile import GB, NodeProfile, make_node
from planner.picture import (
    WIDTH,
    Arrow,
    Box,
    Canvas,
    Label,
    Picture,
    Segment,
    bar,
    fitted,
    text_width,
    wrapped,
)
from planner.plan import Plan, Refusal
from planner.plan_picture import hops_of, plan_picture
from planner.refusal import gb
from planner.refusal_picture import refusal_picture
from planner.solver import PlanOptions, make_plan
from tests.fake_models import made_up_model

LONG = "the-studio-behind-the-printer-of-the-third-floor-{}"
CHIPS = (
    "Apple M4",
    "Apple M3 Ultra",
    "NVIDIA GeForce RTX 5090 Laptop GPU",
    "AMD EPYC 9654 96-Core Processor",
)


def nodes_of(num: int, memory_gb: int = 64, name: str = "mac-{}") -> list[NodeProfile]:
    return [
        make_node(rank, name.format(rank), f"h{rank}", memory_bytes=memory_gb * GB, chip=CHIPS[rank % 4])
        for rank in range(num)
    ]


def cost_of(nodes: list[NodeProfile], options: PlanOptions, layer_bytes: int = GB, *links: Link) -> CostModel:
    model = made_up_model([layer_bytes] * 24, embed_bytes=GB, head_bytes=GB, kv_token_bytes=10_000)
    return CostModel(model, nodes, links, options.work)


def planned(cost: CostModel, options: PlanOptions) -> Plan:
    plan = make_plan(cost.model, cost.nodes, cost.links, options)
    assert isinstance(plan, Plan)
    return plan


def boxes(picture: Picture) -> dict[str, Box]:
    return {item.name: item for item in picture.items if isinstance(item, Box) and item.name}


def assert_inside(picture: Picture) -> None:
    """Nothing leaves the picture, and no two lines of text lie on each other."""
    labels = [item for item in picture.items if isinstance(item, Label)]
    spans = []
    for label in labels:
        left = label.x - {"start": 0.0, "middle": label.width / 2, "end": label.width}[label.anchor]
        spans.append((label.y, left, left + label.width, label.text))
        assert left >= 0, label
        assert left + label.width <= WIDTH, label
        assert 0 < label.y < picture.height
        assert label.size >= 11, "small type is not read on a phone"
    for i, (y, left, right, text) in enumerate(spans):
        for other_y, other_left, other_right, other in spans[i + 1 :]:
            is_apart = abs(y - other_y) > 8 or right <= other_left or other_right <= left
            assert is_apart, (text, other)
    for box in (item for item in picture.items if isinstance(item, Box)):
        assert box.x >= 0
        assert box.x + box.width <= WIDTH + 1e-6
        assert box.y + box.height <= picture.height


@pytest.mark.parametrize("name", ["mac-{}", LONG])
@pytest.mark.parametrize(
    ("num", "strategy"), [(1, "optimal"), (2, "uniform"), (3, "uniform"), (8, "uniform")]
)
def test_a_plan_is_drawn_from_the_head_round_to_the_head(num: int, strategy: str, name: str) -> None:
    options = PlanOptions(8192, 3, strategy)
    cost = cost_of(nodes_of(num, name=name), options)
    plan = planned(cost, options)
    picture = plan_picture(plan, cost)
    assert_inside(picture)
    arrows = [item for item in picture.items if isinstance(item, Arrow)]
    assert len(arrows) == num + 1 == len(hops_of(plan, cost))
    drawn = boxes(picture)
    for part in plan.assignments:
        assert f"layers {part.start}:{part.stop} ({part.stop - part.start})" in " ".join(picture.texts)
        assert f"{part.decode_ms:.1f} ms" in picture.texts
        assert f"{part.node} time" in drawn
    for text in (
        "24 layers, 3 requests of 8192 tokens",
        f"{plan.predicted.decode_tok_s:.1f}",
        "tok/s, all 3 users",
    ):
        assert text in picture.texts
    assert plan.digest in picture.texts[-1]


def test_the_parts_of_a_memory_bar_are_to_scale_and_add_up() -> None:
    options = PlanOptions(8192, 2, "uniform")
    cost = cost_of(nodes_of(3), options)
    plan = planned(cost, options)
    drawn = boxes(plan_picture(plan, cost))
    for part in plan.assignments:
        bars = [drawn[f"{part.node} {name}"] for name in ("weights", "KV", "scratch", "free", "reserve")]
        sizes = [part.weight_bytes, part.kv_bytes, part.activation_bytes]
        sizes += [part.budget_bytes - part.need_bytes, part.reserve_bytes]
        whole = sum(box.width for box in bars)
        for box, size in zip(bars, sizes, strict=True):
            assert box.width / whole == pytest.approx(size / (part.budget_bytes + part.reserve_bytes))
        for left, right in pairwise(bars):
            assert left.x + left.width == pytest.approx(right.x)
        assert [box.is_hatched for box in bars] == [False] * 4 + [True]
    times = {part.node: drawn[f"{part.node} time"].width / part.decode_ms for part in plan.assignments}
    assert len({round(width, 6) for width in times.values()}) == 1, "one scale for all times"


def test_hops_say_what_the_links_are() -> None:
    options = PlanOptions(8192, 1, "uniform")
    nodes = nodes_of(2)
    cost = cost_of(nodes, options, GB, Link(frozenset((0, 1)), latency_ms=7.5, bandwidth_gbit_s=0.5))
    plan = planned(cost, options)
    first, second, back = hops_of(plan, cost)
    assert first.text == "same node"
    assert second.text == f"hop {second.total_ms:.2f} ms, latency 7.5 ms, 0.5 Gbit/s"
    assert second.total_ms == pytest.approx(7.5 + cost.frame_bytes(1) * 8 / 0.5e6)
    assert sum(hop.total_ms for hop in (first, second, back)) == pytest.approx(
        1e3 / plan.predicted.decode_tok_s - sum(part.decode_ms for part in plan.assignments)
    )
    assert f"{back.text}, back" in plan_picture(plan, cost).texts


def test_nodes_without_layers_stand_apart() -> None:
    options = PlanOptions(8192, 1)
    nodes = [*nodes_of(2), replace(nodes_of(3)[2], use=False)]
    cost = cost_of(nodes, options)
    plan = planned(cost, options)
    assert len(plan.assignments) == 1
    texts = plan_picture(plan, cost).texts
    behind = texts[texts.index("Without layers") :]
    idle = [name for name in ("mac-0", "mac-1", "mac-2") if name != plan.assignments[0].node]
    assert all(name in behind for name in idle)
    assert "not used" in behind
    everyone = planned(cost_of(nodes[:2], options), PlanOptions(8192, 1, "uniform"))
    assert "Without layers" not in plan_picture(everyone, cost_of(nodes[:2], options)).texts


def test_a_forced_plan_says_so() -> None:
    options = PlanOptions(8192, 1, is_forced=True)
    cost = cost_of(nodes_of(2, memory_gb=16), options)
    plan = planned(cost, options)
    picture = plan_picture(plan, cost)
    assert_inside(picture)
    assert "Forced: it does not fit" in picture.texts


@pytest.mark.parametrize("num", [1, 2, 5, 8])
def test_a_refusal_is_the_budgets_and_what_is_missing(num: int) -> None:
    options = PlanOptions(8192)
    cost = cost_of(
        [*nodes_of(num, name=LONG), make_node(9, "off", "o", memory_bytes=GB, use=False)], options, 99 * GB
    )
    refusal = make_plan(cost.model, cost.nodes, (), options)
    assert isinstance(refusal, Refusal)
    picture = refusal_picture(refusal, cost)
    assert_inside(picture)
    assert f"Does not fit: {gb(refusal.missing_bytes)} missing" in picture.texts
    drawn = boxes(picture)
    offered, missing = drawn["all budgets budget"], drawn["all budgets missing"]
    budget_bytes = sum(node.budget_bytes for node in cost.nodes if node.use)
    assert offered.width / missing.width == pytest.approx(budget_bytes / refusal.missing_bytes)
    assert missing.is_hatched
    needed = sum(drawn[f"needed {name}"].width for name in ("weights", "KV", "scratch"))
    assert needed == pytest.approx(offered.width + missing.width, rel=0.01)
    assert "off budget" not in drawn
    assert refusal.advice in " ".join(picture.texts)


def test_a_refusal_without_a_number_is_drawn_too() -> None:
    options = PlanOptions(8192)
    refusal = Refusal("no legal cut fits", 0, "Remove forced layers.")
    picture = refusal_picture(refusal, cost_of(nodes_of(1), options))
    assert "Does not fit" in picture.texts
    assert "all budgets missing" not in boxes(picture)


def test_text_is_cut_to_its_place() -> None:
    rng = random.Random(7)
    for _ in range(200):
        text = "x" * rng.randint(0, 90)
        width, size = rng.uniform(60, 300), rng.choice([11, 15, 18])
        cut = fitted(text, width, size)
        assert text_width(cut, size) <= max(width, text_width("xxxx", size))
        assert cut == text or "…" in cut
    assert wrapped("one two three", 70, 12) == ["one two", "three"]


def test_a_bar_leaves_out_what_is_nothing() -> None:
    parts = [Segment("a", 3, "#000"), Segment("b", 0, "#111"), Segment("c", 1, "#222", is_hatched=True)]
    first, second = bar(Box(10, 20, 100, 5, name="me"), parts, 8)
    assert (first.name, first.x, first.width) == ("me a", 10, 37.5)
    assert (second.name, second.x, second.width, second.is_hatched) == ("me c", 47.5, 12.5, True)
    assert bar(Box(0, 0, 1, 1), parts, 0) == []
    assert Canvas().finish().items == ()
