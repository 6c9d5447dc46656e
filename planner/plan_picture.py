"""The picture of a plan: the ring from top to bottom, each stage's memory and time, each hop's link. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.cost import CostModel
from planner.node_profile import NodeProfile
from planner.picture import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    LIGHT,
    MARGIN,
    ORANGE,
    PAPER,
    PINK,
    RED,
    WIDTH,
    Arrow,
    Box,
    Canvas,
    Label,
    Picture,
    Segment,
    bar,
    fitted,
)
from planner.plan import Assignment, Plan
from planner.refusal import gb

RETURN_WIDTH = 22.0  # room at the left for the way back to the head
CARD_X = MARGIN + RETURN_WIDTH
CARD_WIDTH = WIDTH - MARGIN - CARD_X
PAD = 10.0
CARD_HEIGHT, GAP_HEIGHT, HEAD_HEIGHT = 112.0, 34.0, 40.0
MEMORY_COLORS = (("weights", BLUE), ("KV", ORANGE), ("scratch", PINK), ("free", PAPER), ("reserve", FAINT))
HATCHED = ("reserve", "missing")


@dataclass(frozen=True, slots=True)
class Hop:
    """A way of a frame. All 0 where it stays on its node."""

    latency_ms: float
    gbit_s: float
    total_ms: float  # with the time that one token's frame takes on the link

    @property
    def text(self) -> str:
        if self.total_ms == 0:
            return "same node"
        return f"hop {self.total_ms:.2f} ms, latency {self.latency_ms:.3g} ms, {self.gbit_s:.3g} Gbit/s"


def hops_of(plan: Plan, cost: CostModel) -> list[Hop]:
    """From the head to the first stage, from stage to stage, and back to the head; for one token."""
    index = {node.rank: i for i, node in enumerate(cost.nodes)}
    places = [None, *(index[part.rank] for part in plan.assignments), None]
    hops = []
    for a, b in pairwise(places):
        total_ms, busy_ms = cost.hop_between_ms(a, b, 1), cost.transfer_ms(a, b, 1)
        tokens = 0 if a is None or b is None else 1
        gbit_s = cost.frame_bytes(tokens) * 8 / (busy_ms * 1e6) if busy_ms > 0 else 0.0
        hops.append(Hop(total_ms - busy_ms, gbit_s, total_ms))
    return hops


def plan_picture(plan: Plan, cost: CostModel) -> Picture:
    """Head, stages and hops in ring order, then the nodes without layers. `cost` is of the plan's nodes."""
    canvas = Canvas()
    by_rank = {node.rank: node for node in cost.nodes}
    heading(canvas, plan.model, plan.num_layers, plan.context, plan.concurrency)
    if plan.refusal is not None:
        canvas.paragraph("Forced: it does not fit", 16, RED, is_bold=True)
        canvas.y += 8
    _promises(canvas, plan)
    legend(canvas, (*MEMORY_COLORS, ("time", GREEN)))
    hops = hops_of(plan, cost)
    top = _head(canvas, by_rank.get(0))
    slowest_ms = max(part.decode_ms for part in plan.assignments)
    for hop, part in zip(hops, plan.assignments, strict=False):
        _hop(canvas, hop)
        _card(canvas, part, by_rank[part.rank], slowest_ms)
    _way_back(canvas, hops[-1], top)
    used = {part.rank for part in plan.assignments}
    _idle(canvas, [node for node in cost.nodes if node.rank not in used])
    canvas.y += 6
    canvas.paragraph(f"strategy {plan.strategy}, objective {plan.objective}, plan {plan.digest}", 11, GREY)
    return canvas.finish()


def heading(canvas: Canvas, model: str, num_layers: int, context: int, concurrency: int) -> None:
    """The model, and what is asked of it."""
    name = fitted(model.rstrip("/").rpartition("/")[2], WIDTH - 2 * MARGIN, 18, is_bold=True)
    users = "one request" if concurrency == 1 else f"{concurrency} requests"
    canvas.add(Label(MARGIN, canvas.y + 18, name, 18, is_bold=True))
    canvas.add(
        Label(MARGIN, canvas.y + 37, f"{num_layers} layers, {users} of {context} tokens", 13, color=GREY)
    )
    canvas.y += 46


def legend(canvas: Canvas, colors: Sequence[tuple[str, str]]) -> None:
    """What the parts of the bars are."""
    x = MARGIN
    for name, fill in colors:
        box = Box(x, canvas.y, 12, 12, fill, INK, name in HATCHED)
        canvas.add(box, Label(x + 16, canvas.y + 10.5, name, 12))
        x += 16 + len(name) * 6.6 + 11
    canvas.y += 24


def memory_segments(part: Assignment) -> list[Segment]:
    """A stage's memory from left to right; their sum is budget + reserve, unless the plan was forced."""
    free_bytes = max(part.budget_bytes - part.need_bytes, 0)
    sizes = (part.weight_bytes, part.kv_bytes, part.activation_bytes, free_bytes, part.reserve_bytes)
    return [
        Segment(name, size, fill, name in HATCHED)
        for (name, fill), size in zip(MEMORY_COLORS, sizes, strict=True)
    ]


def _promises(canvas: Canvas, plan: Plan) -> None:
    told = plan.predicted
    users = "together" if plan.concurrency == 1 else f"all {plan.concurrency} users"
    values = (
        (f"{told.decode_tok_s:.1f}", "tok/s, one user"),
        (f"{told.throughput_tok_s:.1f}", f"tok/s, {users}"),
        (f"{told.ttft_s:.2f} s", "to the first token"),
    )
    width = (WIDTH - 2 * MARGIN) / len(values)
    for i, (value, what) in enumerate(values):
        x = MARGIN + i * width
        canvas.add(
            Label(x, canvas.y + 22, value, 22, is_bold=True), Label(x, canvas.y + 38, what, 11, color=GREY)
        )
    canvas.y += 54


def _head(canvas: Canvas, head: NodeProfile | None) -> float:
    """The box that all hops start and end at; returns the height of its middle."""
    name = fitted(head.name if head is not None else "rank 0", CARD_WIDTH - 180, 14, is_bold=True)
    canvas.add(
        Box(CARD_X, canvas.y, CARD_WIDTH, HEAD_HEIGHT, LIGHT, FAINT),
        Label(CARD_X + PAD, canvas.y + 25, name, 14, is_bold=True),
        Label(
            CARD_X + CARD_WIDTH - PAD, canvas.y + 25, "head: requests, tokens", 12, anchor="end", color=GREY
        ),
    )
    middle = canvas.y + HEAD_HEIGHT / 2
    canvas.y += HEAD_HEIGHT
    return middle


def _hop(canvas: Canvas, hop: Hop) -> None:
    x = CARD_X + 24
    canvas.add(
        Arrow(((x, canvas.y), (x, canvas.y + GAP_HEIGHT))),
        Label(x + 12, canvas.y + GAP_HEIGHT / 2 + 4, hop.text, 12, color=GREY),
    )
    canvas.y += GAP_HEIGHT


def _card(canvas: Canvas, part: Assignment, node: NodeProfile, slowest_ms: float) -> None:
    """One stage: who, which layers, memory, time."""
    x, y, inner = CARD_X + PAD, canvas.y, CARD_WIDTH - 2 * PAD
    owns = "".join(
        f" + {word}" for word, is_own in (("embedding", part.embed), ("head", part.head)) if is_own
    )
    chip = node.figures.name.removeprefix("Apple ")
    time = f"{part.decode_ms:.1f} ms"
    total = max(part.budget_bytes, part.need_bytes) + part.reserve_bytes
    sizes = f"{gb(part.weight_bytes)} + {gb(part.kv_bytes)} KV + {gb(part.activation_bytes)} scratch"
    canvas.add(
        Box(CARD_X, y, CARD_WIDTH, CARD_HEIGHT, PAPER, GREY),
        Label(x, y + 20, fitted(part.node, inner - 80, 15, is_bold=True), 15, is_bold=True),
        Label(x + inner, y + 20, time, 15, is_bold=True, anchor="end"),
        Label(x, y + 38, f"layers {part.start}:{part.stop} ({part.stop - part.start}){owns}", 12),
        Label(x + inner, y + 38, fitted(chip, 110, 12), 12, anchor="end", color=GREY),
        *bar(Box(x, y + 46, inner, 20, name=part.node), memory_segments(part), total),
        Label(x, y + 81, sizes, 11, color=GREY),
        Label(x + inner, y + 81, f"of {gb(part.budget_bytes)}", 11, anchor="end", color=GREY),
        Box(x, y + 91, inner * part.decode_ms / slowest_ms, 10, GREEN, INK, name=f"{part.node} time"),
    )
    canvas.y += CARD_HEIGHT


def _way_back(canvas: Canvas, hop: Hop, top: float) -> None:
    """From the last stage to the head, along the left side."""
    out, x = CARD_X + 24, MARGIN + 4
    canvas.add(
        Arrow(((out, canvas.y), (out, canvas.y + 16), (x, canvas.y + 16), (x, top), (CARD_X, top))),
        Label(out + 12, canvas.y + 20, f"{hop.text}, back", 12, color=GREY),
    )
    canvas.y += 30


def _idle(canvas: Canvas, nodes: Sequence[NodeProfile]) -> None:
    """Nodes without layers, apart from the ring."""
    if not nodes:
        return
    canvas.y += 6
    canvas.add(Label(MARGIN, canvas.y + 13, "Without layers", 13, is_bold=True, color=GREY))
    canvas.y += 22
    for node in nodes:
        why = "not used" if not node.use else f"budget {gb(node.budget_bytes)}"
        chip = fitted(node.figures.name.removeprefix("Apple "), 80, 12)
        canvas.add(
            Box(MARGIN, canvas.y, WIDTH - 2 * MARGIN, 26, PAPER, FAINT, is_dashed=True),
            Label(MARGIN + PAD, canvas.y + 17, fitted(node.name, 150, 12), 12, color=GREY),
            Label(MARGIN + 240, canvas.y + 17, chip, 12, anchor="end", color=GREY),
            Label(WIDTH - MARGIN - PAD, canvas.y + 17, why, 12, anchor="end", color=GREY),
        )
        canvas.y += 32
