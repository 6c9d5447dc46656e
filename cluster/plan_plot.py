"""Draws a picture into an SVG or PNG file with matplotlib, which is imported for nothing else.

Needs no display; the same picture gives the same bytes. Text stays text in an SVG. One thread.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config_read import ConfigError
from planner.cost import CostModel
from planner.picture import Arrow, Box, Label, Picture
from planner.plan import Plan, Refusal
from planner.plan_picture import plan_picture
from planner.refusal_picture import refusal_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
PX = 1 / 96  # a logical pixel in inches, as CSS has it
POINTS = 0.75  # of a logical pixel
PNG_SCALE = 2.0  # pixels of the file for each logical one
FONTS = ["Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans", "sans-serif"]
STYLE: Any = {
    "svg.fonttype": "none",  # text, not outlines
    "svg.hashsalt": "macrame",  # else ids are random
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a $ is a $
}


def plot_path(text: str) -> Path:
    """The argument of --plot; argparse makes exit code 3 of its ArgumentTypeError."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end with .svg or .png")
    return path


def draw_plan(result: Plan | Refusal, cost: CostModel, path: Path) -> None:
    """Write the ring, or what is missing. Raises ConfigError where the file cannot be written."""
    draw(plan_picture(result, cost) if isinstance(result, Plan) else refusal_picture(result, cost), path)


def draw(picture: Picture, path: Path) -> None:
    """Write the picture. Raises ConfigError where the file cannot be written."""

    def fill(figure: Figure) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, picture.width)
        axes.set_ylim(picture.height, 0)
        axes.set_axis_off()
        for item in picture.items:
            _draw_item(axes, item)

    save(fill, picture.width, picture.height, path)


def save(fill: Callable[[Figure], None], width: float, height: float, path: Path) -> None:
    """A figure of so many logical pixels, made by `fill`, as a file. Raises ConfigError."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of names in a script that the font lacks
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width * PX, height * PX), facecolor="white")
        fill(figure)
        is_svg = path.suffix.lower() == ".svg"
        metadata: dict[str, Any] = {"Date": None, "Creator": None} if is_svg else {"Software": None}
        try:
            figure.savefig(path, dpi=PNG_SCALE / PX, metadata=metadata)
        except OSError as error:
            raise ConfigError(f"--plot {path}: the file cannot be written: {error.strerror}") from None
    if is_svg:
        _name_fonts(path)


def _name_fonts(path: Path) -> None:
    """An SVG is shown with the reader's fonts: name those that look best on their system first."""
    text = path.read_text(encoding="utf-8")
    fonts = ", ".join(f"'{name}'" if " " in name else name for name in FONTS)
    path.write_text(text.replace("'DejaVu Sans'", fonts), encoding="utf-8")


def _draw_item(axes: Axes, item: Box | Label | Arrow) -> None:
    if isinstance(item, Box):
        _draw_box(axes, item)
    elif isinstance(item, Label):
        anchors = {"start": "left", "middle": "center", "end": "right"}
        axes.text(
            item.x,
            item.y,
            item.text,
            fontsize=item.size * POINTS,
            fontweight="bold" if item.is_bold else "normal",
            ha=anchors[item.anchor],
            va="baseline",
            color=item.color,
        )
    else:
        *_, before, last = item.points
        xs, ys = zip(*item.points, strict=True)
        axes.plot(xs, ys, color=item.color, linewidth=1.2, solid_capstyle="butt")
        axes.annotate(
            "", xy=last, xytext=before, arrowprops={"arrowstyle": "-|>", "color": item.color, "lw": 1.2}
        )


def _draw_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    patch = Rectangle(
        (box.x, box.y),
        box.width,
        box.height,
        facecolor=box.fill,
        edgecolor=box.edge or "none",
        linewidth=0.7,
        linestyle="--" if box.is_dashed else "-",
        hatch="////" if box.is_hatched else None,
    )
    if box.name:
        patch.set_gid(box.name.replace(" ", "-"))
    axes.add_patch(patch)
