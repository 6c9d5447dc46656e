"""Draws a few tokens of a trace, a line for each row of the file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.plan_plot import POINTS, save
from cluster.trace_file import REQUESTS_PID
from cluster.trace_spans import Part
from planner.picture import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, YELLOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LEFT, RIGHT = 1100.0, 210.0, 16.0
TOP, LINE, BOTTOM = 40.0, 17.0, 46.0
NUM_TRIPS = 2  # that are drawn: more would be too fine to see
COLORS = {
    Part.QUEUE: GREY,
    Part.BUILD: ORANGE,
    Part.COMPUTE: BLUE,
    Part.SAMPLE: PINK,
    Part.OUT: GREEN,
    Part.CREDIT: RED,
    Part.WIRE: SKY,
    Part.RETURN: SKY,
    Part.IN: GREEN,
    Part.HEAD: YELLOW,
    Part.DRAFT: PINK,
    Part.LOAD: BLUE,
    Part.OTHER: "#dddddd",
}

Event = dict[str, Any]


def draw_trace(file: dict[str, Any], path: Path) -> None:
    """Write it. Raises ConfigError where the file cannot be written, ValueError for a trace without spans."""
    events = [event for event in file["traceEvents"] if event["ph"] == "X"]
    if not events:
        raise ValueError("the trace has no spans: there is nothing to draw")
    began, ended = _window(events)
    shown = [e for e in events if e["ts"] < ended and e["ts"] + e["dur"] > began]
    rows = sorted({(e["pid"], e["tid"]) for e in shown})
    names = _names(file["traceEvents"])
    height = TOP + LINE * len(rows) + BOTTOM

    def fill(figure: Figure) -> None:
        box = (LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + RIGHT) / WIDTH, LINE * len(rows) / height)
        axes = figure.add_axes(box)
        for event in shown:
            _bar(axes, event, rows.index((event["pid"], event["tid"])), began)
        _frame(axes, rows, names, (ended - began) / 1e3)
        model = str(file["otherData"].get("model", "")).rpartition("/")[2]
        title = f"{model}: {NUM_TRIPS} of the traced trips"
        figure.text(14 / WIDTH, 1 - 24 / height, title, fontsize=13 * POINTS, fontweight="bold", color=INK)

    save(fill, WIDTH, height, path)


def _window(events: Sequence[Event]) -> tuple[float, float]:
    """Trips from the middle of the answer, in us; all of the trace where there are none."""
    trips = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e["pid"] == REQUESTS_PID and e["name"].startswith("token ")
    )
    if not trips:
        return min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    first = max(0, len(trips) // 2 - NUM_TRIPS // 2)
    chosen = trips[first : first + NUM_TRIPS]
    return chosen[0][0], chosen[-1][1]


def _names(events: Sequence[Event]) -> dict[tuple[int, int], str]:
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return {key: f"{processes.get(key[0], '')}  {name}" for key, name in threads.items()}


def _bar(axes: Axes, event: Event, row: int, began: float) -> None:
    color = COLORS.get(Part(event["cat"]), GREY)
    is_outer = event["cat"] == Part.OTHER.value
    start_ms, took_ms = (event["ts"] - began) / 1e3, event["dur"] / 1e3
    thickness = 0.9 if is_outer else 0.62
    axes.barh(row, took_ms, thickness, start_ms, color=color, edgecolor="white", linewidth=0.3)


def _frame(axes: Axes, rows: Sequence[tuple[int, int]], names: dict[tuple[int, int], str], ms: float) -> None:
    axes.set_xlim(0, ms)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [names.get(row, "") for row in rows], fontsize=10 * POINTS)
    axes.tick_params(length=0, labelsize=10 * POINTS)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel("ms", fontsize=11 * POINTS)
    for i, (before, after) in enumerate(itertools.pairwise(rows)):
        if before[0] != after[0]:
            axes.axhline(i + 0.5, color="#999999", linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
