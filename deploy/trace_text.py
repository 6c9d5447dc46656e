"""What `macrame trace` prints for people. Pure."""

from __future__ import annotations

from typing import Any

from deploy.narrow import fitted

PART = "where"


def render(found: dict[str, Any], width: int | None = None) -> str:
    """The object of `macrame trace --json`."""
    lines = [_head(found), ""]
    if found["parts"]:
        lines += fitted([_row(row) for row in found["parts"]] + [_whole(found)], width)
        lines += ["", *fitted([_node(node) for node in found["nodes"]], width)]
    else:
        lines.append("no token came back after the first one: there is nothing to add up")
    lines += ["", *_notes(found)]
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> str:
    first = found["first_token_ms"]
    told = f"{found['model']}: {found['tokens']} tokens traced"
    if found["others"]:
        told += f", while {found['others']} other requests ran"
    if first is not None:
        told += f"; the first after {found['queued_ms'] + first:.1f} ms"
    if found["tokens_of_trips"] > found["trips"]:
        told += f"; {found['tokens_of_trips']} more in {found['trips']} trips, as guesses were right"
    return told


def _row(row: dict[str, Any]) -> dict[str, str]:
    return {
        PART: row["part"],
        "p50 ms": f"{row['p50_ms']:.3f}",
        "mean ms": f"{row['mean_ms']:.3f}",
        "share": f"{row['share']:.1%}",
    }


def _whole(found: dict[str, Any]) -> dict[str, str]:
    trip = found["trip_ms"]
    return {
        PART: "a whole trip",
        "p50 ms": f"{trip['p50']:.3f}",
        "mean ms": f"{trip['mean']:.3f}",
        "share": "100.0%",
    }


def _node(node: dict[str, Any]) -> dict[str, str]:
    told = node["mean_ms"]
    clock = node["clock_uncertainty_us"]
    return {
        "node": node["name"],
        "mean ms: queue": _ms(told, "queue"),
        "build": _ms(told, "graph building"),
        "compute": _ms(told, "compute"),
        "sample": _ms(told, "sampling"),
        "copy out": _ms(told, "copy out"),
        "wire in": _ms(told, "wire", "return to the head"),
        "copy in": _ms(told, "copy in"),
        "clock ± us": "-" if clock is None else f"{clock:.0f}",
    }


def _ms(told: dict[str, float], *parts: str) -> str:
    found = [told[part] for part in parts if part in told]
    return f"{sum(found):.3f}" if found else "-"


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    if found["layers_per_span"]:
        notes.append(
            "note: layers were evaluated by themselves, which takes longer than a step as one graph: compare "
            "them with each other, not with a trace without --layers"
        )
    if found["unfinished_frames"]:
        count = found["unfinished_frames"]
        frames = "one frame" if count == 1 else f"{count} frames"
        notes.append(f"note: {frames} never came back, marked as unfinished in the trace")
    notes += [f"partial: {trouble}" for trouble in found["trouble"]]
    if (path := found["file"]) is not None:
        notes.append(f"the timeline is in {path}: open it at https://ui.perfetto.dev")
    return notes
