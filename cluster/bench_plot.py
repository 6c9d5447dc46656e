"""Draws what `macrame bench` measured: stages' busy shares, speed and waits over the number of users."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.plan_plot import POINTS, save
from planner.picture import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, WIDTH, YELLOW, fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_HEIGHT, TOP, BOTTOM = 200.0, 62.0, 20.0
STAGE_COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, RED, "#999999")
HATCHES = (None, "///", "...")  # for more stages than colours
MAX_BARS = 16  # more have no numbers
_WAITS = (("ttft_ms", "first token", RED, "s"), ("gap_ms", "gap", GREEN, "o"))


def draw_bench(result: dict[str, Any], path: Path) -> None:
    """Write it; `result` is the object of `macrame bench --json`. Raises ConfigError for the file."""
    height = TOP + 3 * PANEL_HEIGHT + BOTTOM

    def fill(figure: Figure) -> None:
        busy, speed, waits = (_panel(figure, height, i) for i in range(3))
        _head(figure, result, height)
        runs = result["runs"]
        _busy(busy, runs, [stage["node"] for stage in result["stages"]])
        _speed(speed, runs)
        _waits(waits, runs)
        for axes in (busy, speed, waits):
            _frame(axes, runs)
        waits.set_xlabel("users at once", fontsize=12 * POINTS)

    save(fill, WIDTH, height, path)


def told(result: dict[str, Any]) -> str:
    """What was asked for, as a line."""
    text = f"{result['prompt_tokens']} prompt and {result['output_tokens']} answered tokens"
    return f"{text}, {result['dataset']}" if "dataset" in result else text


def _head(figure: Figure, result: dict[str, Any], height: float) -> None:
    name = fitted(str(result["model"]).rpartition("/")[2], WIDTH - 28, 18, is_bold=True)
    figure.text(14 / WIDTH, 1 - 28 / height, name, fontsize=18 * POINTS, fontweight="bold", color=INK)
    figure.text(14 / WIDTH, 1 - 46 / height, told(result), fontsize=12 * POINTS, color=GREY)


def _panel(figure: Figure, height: float, number: int) -> Axes:
    top = TOP + number * PANEL_HEIGHT + 22
    axes: Axes = figure.add_axes(
        (50 / WIDTH, 1 - (top + PANEL_HEIGHT - 62) / height, 336 / WIDTH, (PANEL_HEIGHT - 62) / height)
    )
    return axes


def _frame(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    users = [f"{run['concurrency']}{'' if run['is_whole'] else '*'}" for run in runs]
    axes.set_xticks(range(len(runs)), users)
    axes.set_xlim(-0.5, len(runs) - 0.5)
    axes.tick_params(labelsize=11 * POINTS, length=2)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _busy(axes: Axes, runs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A bar for each stage of each run."""
    _title(axes, "busy share of each stage")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [at + (i - (len(names) - 1) / 2) * width for at in range(len(runs))]
        shares = [100 * run["stage_busy"][i] for run in runs]
        axes.bar(
            places,
            shares,
            width=width,
            color=STAGE_COLORS[i % len(STAGE_COLORS)],
            edgecolor=INK,
            linewidth=0.5,
            hatch=HATCHES[i // len(STAGE_COLORS) % len(HATCHES)],
            label=fitted(name, 90, 10),
        )
        if len(names) * len(runs) <= MAX_BARS:
            for place, share in zip(places, shares, strict=True):
                axes.text(place, share + 1, f"{share:.0f}", ha="center", fontsize=10 * POINTS, color=INK)
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 50, 100], ["0", "50 %", "100 %"])
    _legend(axes, min(4, len(names)))


def _speed(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Tokens a second of all users, and of one."""
    _title(axes, "tok/s")
    look: Any = {"markersize": 5, "linewidth": 1.5}
    everyone, one = ([run[key] for run in runs] for key in ("aggregate_tok_s", "decode_tok_s"))
    axes.plot(everyone, color=ORANGE, marker="s", linestyle="--", label="all users", **look)
    axes.plot(one, color=BLUE, marker="o", label="one user, after the first token", **look)
    axes.set_ylim(0, 1.1 * max([*everyone, *one, 1.0]))
    _legend(axes, 2)


def _waits(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Medians, with p99 above them."""
    _title(axes, "ms until the first token, and between tokens")
    for key, name, color, marker in _WAITS:
        medians, worst = ([_or_gap(run[key][part]) for run in runs] for part in ("p50", "p99"))
        axes.plot(medians, color=color, marker=marker, markersize=5, linewidth=1.5, label=f"{name} p50")
        axes.plot(worst, color=color, marker=marker, markersize=4, linewidth=1, linestyle=":", label="p99")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes, 4, below=-0.2)


def _or_gap(value: float | None) -> float:
    """NaN leaves a gap in a line."""
    return math.nan if value is None else value


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=13 * POINTS, fontweight="bold", loc="left", color=INK)


def _legend(axes: Axes, num_columns: int, below: float = -0.1) -> None:
    """Below the panel, where no value can lie under it."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, below),
        ncols=num_columns,
        fontsize=10 * POINTS,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.5,
    )
