"""What `macrame profile` measured, as a table for people. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.measured_speeds import MeasuredSpeeds
from planner.node_profile import NodeProfile
from planner.refusal import gb
from planner.render import table
from planner.speeds import Speeds, table_speeds

if TYPE_CHECKING:
    from cluster.profile_machine import Measured

_DISK = {
    "direct": "past the system's cache",
    "dropped": "after its pages were dropped from the system's cache",
    "cached": "perhaps from the system's cache: this file system allows nothing else",
}


def profile_text(
    node: NodeProfile, found: MeasuredSpeeds, measured: Measured, took_s: float, path: Path | None
) -> str:
    """The speeds, what they were fitted to, and where they are kept."""
    by_format: dict[str, dict[int, tuple[float, float]]] = {}
    for p in measured.products:
        by_format.setdefault(p.format, {})[p.rows] = (p.bytes_ms / 1e6, p.weights_ms / 1e6)
    rows = [
        {
            "precision": name,
            "1 row": f"{rates[1][1]:.3g} G weights/s",
            "reads": f"{rates[1][0]:.3g} GB/s",
            "8 rows": f"{rates[8][1]:.3g} G weights/s",
            "512 rows": f"{2 * rates[512][1] / 1e3:.3g} TFLOPS",
        }
        for name, rates in by_format.items()
    ]
    spread = sorted([measured.copy_spread, *(p.spread for p in measured.products)])
    lines = [
        speeds_text(node, found),
        "",
        *table(rows),
        "",
        f"copy: {measured.copy_bytes_ms / 1e6:.3g} GB/s, read and written together",
    ]
    if measured.disk is not None:
        lines.append(f"disk: {measured.disk.bytes_ms / 1e6:.3g} GB/s, {_DISK[measured.disk.how]}")
    lines += [f"not measured: {line}" for line in measured.skipped]
    lines.append(
        f"{measured.num_rounds} rounds in {took_s:.1f} s; the middle one was {spread[len(spread) // 2]:.0%} "
        f"slower than the best, which counts, {spread[-1]:.0%} for the least steady figure"
    )
    if path is not None:
        lines.append(f"kept in {path}: plans use it from now on")
    return "\n".join(lines)


def speeds_text(node: NodeProfile, found: MeasuredSpeeds) -> str:
    """The speeds that plans reckon with, beside those of the chip table."""
    figures = node.figures
    known = "the chip table" if figures.is_known else "a floor: the chip table lacks it"
    return "\n".join(
        [
            f"{figures.name}, {gb(node.memory_bytes)}, measured on {found.measured_on}",
            "",
            *table([_row("measured", found.speeds), _row(known, table_speeds(figures))]),
        ]
    )


def _row(name: str, speeds: Speeds) -> dict[str, str]:
    return {
        "node": name,
        "reads": f"{speeds.read_bytes_ms / 1e6:.3g} GB/s",
        "multiplies": f"{speeds.flops_ms / 1e9:.3g} TFLOPS",
        "a layer": f"{speeds.layer_ms:.3f} ms",
        "a stage": f"{speeds.stage_ms:.3f} ms",
    }
