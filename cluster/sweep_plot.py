"""Draws a sweep: speed, memory and layers over the value that changes. One thread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.plan_plot import POINTS, save
from planner.picture import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, WIDTH, YELLOW, fitted, wrapped
from planner.plan import Plan, Refusal
from planner.refusal import gb
from planner.sweep import Sweep, fill_of, told

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_HEIGHT, TOP, BOTTOM = 190.0, 80.0, 16.0
LEGEND_LINE = 20.0
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, RED, "#999999")
HATCHES = (None, "///", "...")  # for more nodes than colours
MARKERS = "osD^vPX*"
MAX_TEXTS = 10  # a sweep of more values has no numbers in its panels
MAX_TICKS = 8
_NOTHING = math.nan  # leaves a gap in a line


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Write it. Raises ConfigError where the file cannot be written."""
    used = {part.node for plan in sweep.plans for part in plan.assignments}
    names = [name for name in sweep.nodes if name in used]
    legend = LEGEND_LINE * (-(-len(names) // 2))
    height = TOP + 3 * PANEL_HEIGHT + legend + BOTTOM

    def fill(figure: Figure) -> None:
        panels = [_panel(figure, height, i) for i in range(3)]
        _head(figure, sweep, height)
        _speed(panels[0], sweep)
        _memory(panels[1], sweep, names)
        _layers(panels[2], sweep, names)
        for axes in panels:
            _frame(axes, sweep)
        panels[2].set_xlabel(_axis_name(sweep), fontsize=12 * POINTS)
        if names:
            handles, labels = panels[2].get_legend_handles_labels()
            figure.legend(
                handles,
                labels,
                loc="lower center",
                ncols=2,
                fontsize=11 * POINTS,
                frameon=False,
                borderaxespad=0.3,
            )

    save(fill, WIDTH, height, path)


def _panel(figure: Figure, height: float, number: int) -> Axes:
    top = TOP + number * PANEL_HEIGHT + 22
    axes: Axes = figure.add_axes(
        (50 / WIDTH, 1 - (top + PANEL_HEIGHT - 52) / height, 336 / WIDTH, (PANEL_HEIGHT - 52) / height)
    )
    return axes


def _head(figure: Figure, sweep: Sweep, height: float) -> None:
    """The model's name, and where the limit lies."""
    name = fitted(sweep.model.rstrip("/").rpartition("/")[2], WIDTH - 28, 18, is_bold=True)
    sentence = told(sweep).split(". ")[0].rstrip(".") + "."
    figure.text(14 / WIDTH, 1 - 30 / height, name, fontsize=18 * POINTS, fontweight="bold", color=INK)
    for line, text in enumerate(wrapped(sentence, WIDTH - 28, 12)[:2]):
        figure.text(14 / WIDTH, 1 - (50 + 16 * line) / height, text, fontsize=12 * POINTS, color=GREY)


def _frame(axes: Axes, sweep: Sweep) -> None:
    """Values in even steps, and stripes where nothing fits."""
    step = -(-len(sweep.results) // (MAX_TICKS if len(sweep.results) > MAX_TEXTS else MAX_TEXTS))
    values = [_short(sweep, value) for value in sweep.range.values]
    axes.set_xticks(range(0, len(values), step), values[::step])
    axes.set_xlim(-0.5, len(sweep.results) - 0.5)
    axes.tick_params(labelsize=11 * POINTS, length=2)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for at, result in enumerate(sweep.results):
        if isinstance(result, Refusal):
            axes.axvspan(
                at - 0.5, at + 0.5, facecolor="#FBE9DD", edgecolor=RED, hatch="///", linewidth=0, zorder=0
            )


def _speed(axes: Axes, sweep: Sweep) -> None:
    """One user's tokens a second, and those of all users where they are more."""
    _title(axes, "tok/s")
    if not sweep.plans:
        axes.set_yticks([])
        return
    told = [result.predicted if isinstance(result, Plan) else None for result in sweep.results]
    one = [_NOTHING if values is None else values.decode_tok_s for values in told]
    everyone = [_NOTHING if values is None else values.throughput_tok_s for values in told]
    has_more = any(plan.concurrency > 1 for plan in sweep.plans)
    look: Any = {"markersize": 5, "linewidth": 1.5}
    axes.plot(one, color=BLUE, marker="o", linestyle="-", label="one user", **look)
    if has_more:
        axes.plot(everyone, color=ORANGE, marker="s", linestyle="--", label="all users", **look)
    axes.set_ylim(0, 1.1 * max(value for value in [*one, *everyone] if not math.isnan(value)))
    axes.legend(loc="lower left", fontsize=11 * POINTS, framealpha=0.8)


def _memory(axes: Axes, sweep: Sweep, names: list[str]) -> None:
    """How full each node is; what is missing is written where nothing fits."""
    _title(axes, "memory: part of each node's budget")
    for i, name in enumerate(names):
        fills = [
            100 * fill_of(result).get(name, _NOTHING) if isinstance(result, Plan) else _NOTHING
            for result in sweep.results
        ]
        axes.plot(
            fills,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
        )
    axes.axhline(100, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 50, 100], ["0", "50 %", "100 %"])
    for at, result in enumerate(sweep.results):
        if isinstance(result, Refusal) and len(sweep.results) <= MAX_TEXTS:
            axes.text(
                at,
                50,
                f"{gb(result.missing_bytes)}\nmissing",
                ha="center",
                va="center",
                rotation=90,
                fontsize=11 * POINTS,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )


def _layers(axes: Axes, sweep: Sweep, names: list[str]) -> None:
    """Who owns how many."""
    _title(axes, "layers of each node")
    below = [0] * len(sweep.results)
    for i, name in enumerate(names):
        counts = [_count(result, name) for result in sweep.results]
        axes.bar(
            range(len(counts)),
            counts,
            bottom=below,
            width=0.7,
            color=COLORS[i % len(COLORS)],
            edgecolor=INK,
            linewidth=0.5,
            hatch=HATCHES[i // len(COLORS) % len(HATCHES)],
            label=fitted(name, 150, 11),
        )
        for at, count in enumerate(counts):
            if count and len(counts) <= MAX_TEXTS:
                axes.text(
                    at,
                    below[at] + count / 2,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=11 * POINTS,
                    color=INK,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                )
        below = [a + b for a, b in zip(below, counts, strict=True)]
    axes.set_ylim(0, 1.05 * max([*below, 1]))
    if not names:
        axes.set_yticks([])


def _count(result: Plan | Refusal, name: str) -> int:
    if isinstance(result, Refusal):
        return 0
    return sum(part.stop - part.start for part in result.assignments if part.node == name)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=13 * POINTS, fontweight="bold", loc="left", color=INK)


def _axis_name(sweep: Sweep) -> str:
    words = {"context": "context in tokens", "concurrency": "requests at once", "memory": "memory in GB"}
    node = f" of {fitted(sweep.range.node, 180, 12)}" if sweep.range.node is not None else ""
    return words[sweep.range.axis].replace(" in", f"{node} in")


def _short(sweep: Sweep, value: int) -> str:
    return f"{value // 1024}k" if sweep.range.axis == "context" and value % 1024 == 0 else str(value)
