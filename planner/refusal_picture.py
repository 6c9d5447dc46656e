"""The picture of a refusal: what the nodes offer, on one scale, and what is missing. Pure."""

from __future__ import annotations

from planner.cost import CostModel
from planner.node_profile import NodeProfile
from planner.picture import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MARGIN,
    ORANGE,
    PAPER,
    PINK,
    RED,
    SKY,
    WIDTH,
    Box,
    Canvas,
    Label,
    Picture,
    Segment,
    bar,
    fitted,
)
from planner.plan import Refusal
from planner.plan_picture import heading, legend
from planner.refusal import gb

INNER = WIDTH - 2 * MARGIN
ROW_HEIGHT = 46.0


def refusal_picture(refusal: Refusal, cost: CostModel) -> Picture:
    """The need and the budgets as two bars of one scale, then each node's budget, then what would help."""
    canvas = Canvas()
    model, work = cost.model, cost.work
    heading(canvas, model.name, model.num_layers, work.context, work.concurrency)
    verdict = (
        f"Does not fit: {gb(refusal.missing_bytes)} missing" if refusal.missing_bytes else "Does not fit"
    )
    canvas.y += 6
    canvas.paragraph(verdict, 18, RED, is_bold=True)
    canvas.y += 12
    colors = (("weights", BLUE), ("KV", ORANGE), ("scratch", PINK), ("budget", SKY))
    legend(canvas, colors)
    legend(canvas, (("missing", PAPER), ("reserve", FAINT)))
    nodes = [node for node in cost.nodes if node.use]
    _whole(canvas, cost, nodes, refusal.missing_bytes)
    most = max((node.budget_bytes + node.reserve_bytes for node in nodes), default=1)
    for node in nodes:
        _row(canvas, node, most)
    canvas.paragraph(f"{refusal.reason}.", 12, GREY)
    canvas.y += 8
    canvas.paragraph(refusal.advice, 13, is_bold=True)
    return canvas.finish()


def _whole(canvas: Canvas, cost: CostModel, nodes: list[NodeProfile], missing_bytes: int) -> None:
    """All that is needed, with scratch on each node, above all that there is."""
    layers = cost.model.num_layers
    used = [index for index, node in enumerate(cost.nodes) if node.use]
    scratch_bytes = sum(cost.activation_bytes(index, 0, max(layers - 1, 1)) for index in used)
    need = (
        ("weights", cost.weight_bytes(0, layers), BLUE),
        ("KV", cost.kv_bytes(0, layers), ORANGE),
        ("scratch", scratch_bytes, PINK),
    )
    budget_bytes = sum(node.budget_bytes for node in nodes)
    total = max(sum(size for _, size, _ in need), budget_bytes + missing_bytes)
    rows = (
        ("needed", [Segment(*part) for part in need], " + ".join(gb(size) for _, size, _ in need)),
        (
            "all budgets",
            [Segment("budget", budget_bytes, SKY), Segment("missing", missing_bytes, PAPER, is_hatched=True)],
            gb(budget_bytes),
        ),
    )
    for name, segments, text in rows:
        canvas.add(
            Label(MARGIN, canvas.y + 13, name, 13, is_bold=True),
            Label(WIDTH - MARGIN, canvas.y + 13, text, 12, anchor="end", color=GREY),
            *bar(Box(MARGIN, canvas.y + 19, INNER, 22, name=name), segments, total),
        )
        canvas.y += 50
    canvas.add(Box(MARGIN, canvas.y, INNER, 0.5, FAINT, FAINT))
    canvas.y += 10


def _row(canvas: Canvas, node: NodeProfile, most: float) -> None:
    """A node's budget and reserve; all nodes on one scale."""
    segments = [
        Segment("budget", node.budget_bytes, SKY),
        Segment("reserve", node.reserve_bytes, FAINT, is_hatched=True),
    ]
    chip = fitted(node.figures.name.removeprefix("Apple "), 90, 12)
    canvas.add(
        Label(MARGIN, canvas.y + 13, fitted(node.name, 180, 13), 13, color=INK),
        Label(MARGIN + 270, canvas.y + 13, chip, 12, anchor="end", color=GREY),
        Label(WIDTH - MARGIN, canvas.y + 13, gb(node.budget_bytes), 12, anchor="end", color=GREY),
        *bar(Box(MARGIN, canvas.y + 19, INNER, 14, name=node.name), segments, most),
    )
    canvas.y += ROW_HEIGHT
