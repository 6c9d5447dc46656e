"""A plan as text: an aligned table, bars of memory and time, what it promises and rests on. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from planner.bars import PLAIN, Look, single, stacked
from planner.kv_profile import PREFILL_CHUNK_TOKENS
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.refusal import gb

_LEFT = ("stage", "rank", "node", "chip", "layers", "state", "precision", "strategy", "speed", "where")
NAME_WIDTH, CHIP_WIDTH = 16, 12
MEMORY_WIDTH, TIME_WIDTH = 28, 16


def render_plan(
    plan: Plan, nodes: Sequence[NodeProfile], notes: Sequence[str] = (), look: Look = PLAIN
) -> str:
    """Several lines without a newline at the end. `nodes` are those that the plan was made for.

    notes: further lines at the end. look: ASCII without colour unless the reader's terminal has more.
    """
    by_rank = {node.rank: node for node in nodes}
    rows = [
        {
            "stage": str(part.stage),
            "rank": str(part.rank),
            "node": look.shorten(part.node, NAME_WIDTH),
            "chip": _chip(by_rank[part.rank], look) if part.rank in by_rank else "",
            "layers": f"{part.start}:{part.stop} ({part.stop - part.start})",
            "weights": gb(part.weight_bytes),
            "KV": gb(part.kv_bytes),
            "scratch": gb(part.activation_bytes),
            "budget": gb(part.budget_bytes),
            "decode": f"{part.decode_ms:.2f} ms",
            "prefill": f"{part.prefill_ms:.1f} ms",
        }
        for part in plan.assignments
    ]
    users = "one request" if plan.concurrency == 1 else f"{plan.concurrency} requests"
    promise = (
        f"predicted: {plan.predicted.decode_tok_s:.1f} tok/s for one user, "
        f"{plan.predicted.throughput_tok_s:.1f} tok/s for {plan.concurrency}, "
        f"first token after {plan.predicted.ttft_s:.2f} s"
    )
    memory = (
        f"memory: the whole model takes {gb(plan.memory.full_model_bytes)}, the fullest node "
        f"{gb(plan.memory.largest_node_bytes)} of it"
    )
    return "\n".join(
        [
            f"{plan.model}: {plan.num_layers} layers, {users} of {plan.context} tokens, "
            f"strategy {plan.strategy}, objective {plan.objective}, plan {plan.digest}",
            "",
            *forced_lines(plan),
            *table(rows),
            "",
            *_bars(plan, look),
            "",
            promise,
            *chunk_lines(plan),
            memory,
            *drafter_lines(plan),
            *_notes(nodes, {part.rank for part in plan.assignments}),
            *plan.notes,
            *notes,
        ]
    )


def chunk_lines(plan: Plan) -> list[str]:
    """In which chunks a prompt is read, where not in the usual ones."""
    if plan.chunk_tokens == PREFILL_CHUNK_TOKENS:
        return []
    return [f"prompts: read in chunks of {plan.chunk_tokens} tokens"]


def drafter_lines(plan: Plan) -> list[str]:
    """What the draft model takes; empty where there is none."""
    part = plan.drafter
    if part is None:
        return []
    return [
        f"draft model: {part.model} on {part.node}, {gb(part.weight_bytes)} of weights, "
        f"{gb(part.kv_bytes)} KV, {gb(part.activation_bytes)} scratch, taken off its budget"
    ]


def forced_lines(plan: Plan) -> list[str]:
    """What a forced plan risks, loudly; empty for a plan that fits."""
    if plan.refusal is None:
        return []
    lines = [f"WARNING: {warning}" for warning in plan.warnings]
    return [f"FORCED, IT DOES NOT FIT: {plan.refusal.sentence}", *lines, ""]


def _chip(node: NodeProfile, look: Look) -> str:
    return look.shorten(node.figures.name.removeprefix("Apple "), CHIP_WIDTH)


def _bars(plan: Plan, look: Look) -> list[str]:
    """A line for each stage, its memory and its part of a token's time, and one for the hops: 80 columns."""
    weights, kv, scratch, free = (look.paint(i, glyph) for i, glyph in enumerate(look.glyphs))
    names = [look.shorten(part.node, NAME_WIDTH) for part in plan.assignments]
    name_width = max(map(len, [*names, "hops"]))
    token_ms = 1e3 / plan.predicted.decode_tok_s
    hops_ms = max(token_ms - sum(part.decode_ms for part in plan.assignments), 0.0)
    gap = " " * (name_width + 2)
    key = f"{weights} weights  {kv} KV  {scratch} scratch  {free} free"
    key_width = len("x weights  x KV  x scratch  x free")
    lines = [f"{gap}{key}{' ' * (MEMORY_WIDTH + 8 - key_width)}{weights} a token's time"]

    def time(ms: float) -> str:
        return f"{single(ms / token_ms, TIME_WIDTH, look)}  {ms / token_ms:4.0%}"

    for name, part in zip(names, plan.assignments, strict=True):
        free_bytes = max(part.budget_bytes - part.need_bytes, 0)
        sizes = (part.weight_bytes, part.kv_bytes, part.activation_bytes, free_bytes)
        full = part.need_bytes / max(part.budget_bytes, 1)
        bar = stacked(sizes, MEMORY_WIDTH, look)
        lines.append(f"{name.ljust(name_width)}  {bar}  {full:4.0%}  {time(part.decode_ms)}")
    if hops_ms / token_ms >= 0.005:
        lines.append(f"{'hops'.ljust(name_width)}  {' ' * (MEMORY_WIDTH + 8)}{time(hops_ms)}")
    return lines


def render_refusal(refusal: Refusal, model: str, nodes: Sequence[NodeProfile], look: Look = PLAIN) -> str:
    """Why nothing fits, the budgets, and what would help."""
    rows = [
        {
            "rank": str(node.rank),
            "node": look.shorten(node.name, NAME_WIDTH),
            "chip": _chip(node, look),
            "memory": gb(node.memory_bytes),
            "ceiling": gb(node.ceiling_bytes),
            "cap": "" if node.cap_bytes is None else gb(node.cap_bytes),
            "reserve": gb(node.reserve_bytes),
            "budget": gb(node.budget_bytes),
        }
        for node in nodes
        if node.use
    ]
    reason = f"{model} does not fit: {refusal.reason}."
    return "\n".join(
        [reason, "", *table(rows), "", refusal.advice, *_notes(nodes, {node.rank for node in nodes})]
    )


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines with the keys as header; words are aligned left, numbers right."""
    if not rows:
        return []
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}

    def line(cells: dict[str, str]) -> str:
        parts = (cells[key].ljust(w) if key in _LEFT else cells[key].rjust(w) for key, w in widths.items())
        return "  ".join(parts).rstrip()

    return [
        line({key: key for key in widths}),
        line({key: "-" * w for key, w in widths.items()}),
        *map(line, rows),
    ]


def _notes(nodes: Sequence[NodeProfile], used: set[int]) -> list[str]:
    """What the figures rest on."""
    idle = [node.name for node in nodes if node.use and node.rank not in used]
    off = [node.name for node in nodes if not node.use]
    measured = [node for node in nodes if node.use and node.measured is not None]
    unknown = sorted(
        {n.figures.name for n in nodes if n.use and n.measured is None and not n.figures.is_known}
    )
    guessed = [node.name for node in nodes if node.use and node.ceiling_source == "guessed"]
    shared = [node.name for node in nodes if node.use and node.num_sharing > 1]
    notes = [f"note: no speed is known for {chip}: a low one is assumed" for chip in unknown]
    for day in sorted({node.measured_on for node in measured}):
        names = ", ".join(node.name for node in measured if node.measured_on == day)
        notes.append(f"note: the speeds of {names} were measured{f' on {day}' if day else ''}")
    if timed := [node.name for node in nodes if node.use and node.forms]:
        notes.append(
            f"note: blocks of experts or EXL3 matrices count as the self-test of kernels timed them on "
            f"{', '.join(timed)}"
        )
    if idle:
        notes.append(f"note: {', '.join(idle)} would own no layers: a part there is slower, or does not fit")
    if off:
        notes.append(f"note: {', '.join(off)} excluded by the config or by --exclude")
    if guessed:
        notes.append(f"note: the memory limit of {', '.join(guessed)} is a guess from the memory size")
    if shared:
        notes.append(f"note: {', '.join(shared)} share one machine's memory evenly")
    return notes
