"""What-if: one value changed step by step, and the plans that come of it. Pure values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from planner.bars import PLAIN, Look, single
from planner.plan import Plan, Refusal
from planner.refusal import gb
from planner.render import NAME_WIDTH, table

Axis = Literal["context", "concurrency", "memory"]
MAX_POINTS = 64
MAX_VALUE = 10**9
SPEED_WIDTH = 12
EXAMPLES = "context=4k..128k, context=4096,30000, concurrency=1..16 or memory:NODE=8..64"
_VALUE = re.compile(r"(\d{1,10})([kK]?)")
_UNITS = {"context": "token", "concurrency": "request", "memory": "GB"}


class SweepError(ValueError):
    """What is no sweep; one sentence."""


@dataclass(frozen=True, slots=True)
class SweepRange:
    """The values to try, ascending. node: whose memory; None for the other axes. Memory is in GB."""

    axis: Axis
    node: str | None
    values: tuple[int, ...]

    @property
    def title(self) -> str:
        """What changes, in words."""
        return f"memory of {self.node}" if self.node is not None else self.axis

    def show(self, value: int) -> str:
        """A value as people write it."""
        return f"{value} GB" if self.axis == "memory" else str(value)


@dataclass(frozen=True, slots=True)
class Sweep:
    """The plan, or its refusal, for each value of the range. nodes: all names, in rank order."""

    model: str
    range: SweepRange
    nodes: tuple[str, ...]
    results: tuple[Plan | Refusal, ...]

    @property
    def plans(self) -> list[Plan]:
        """Those that fit."""
        return [result for result in self.results if isinstance(result, Plan)]


def parse_range(text: str) -> SweepRange:
    """AXIS=FROM..TO, doubling from step to step and ending with TO, or AXIS=VALUE,VALUE; k is 1024.

    Raises SweepError.
    """
    name, is_given, values = text.partition("=")
    axis, is_node, node = name.strip().partition(":")
    if not is_given or axis not in _UNITS or (axis == "memory") != bool(is_node and node):
        raise SweepError(f"{text!r} is no sweep: write {EXAMPLES}")
    found = _doubled(text, *values.split("..", 1)) if ".." in values else _listed(text, values.split(","))
    if len(found) > MAX_POINTS:
        raise SweepError(f"{text!r} asks for {len(found)} plans: {MAX_POINTS} are the most")
    return SweepRange("context" if axis == "context" else _other(axis), node or None, tuple(found))


def _other(axis: str) -> Axis:
    return "memory" if axis == "memory" else "concurrency"


def _doubled(text: str, first: str, last: str) -> list[int]:
    low, high = _value(text, first), _value(text, last)
    if low > high:
        raise SweepError(f"{text!r} must go up: write the smaller value first")
    found = [low]
    while found[-1] * 2 < high:
        found.append(found[-1] * 2)
    return found if found[-1] == high else [*found, high]


def _listed(text: str, parts: Sequence[str]) -> list[int]:
    return sorted({_value(text, part) for part in parts})


def _value(text: str, part: str) -> int:
    match = _VALUE.fullmatch(part.strip())
    value = 0 if match is None else int(match[1]) * (1024 if match[2] else 1)
    if not 0 < value <= MAX_VALUE:
        raise SweepError(
            f"{text!r} has the value {part.strip()!r}: write whole numbers above 0, such as 4096 or 4k"
        )
    return value


# -- as text ----------------------------------------------------------------------------------------------
def render_sweep(sweep: Sweep, look: Look = PLAIN) -> str:
    """A line for each value: what fits, the layers of each node, and how fast; without colour."""
    look = Look(look.is_unicode)
    fastest = max((plan.predicted.decode_tok_s for plan in sweep.plans), default=1.0)
    # A node that never has a layer needs no place in the list of layers.
    used = {part.node for plan in sweep.plans for part in plan.assignments}
    names = [name for name in sweep.nodes if name in used]
    rows = [
        {
            sweep.range.title: sweep.range.show(value),
            **_cells(result, names, fastest, look),
        }
        for value, result in zip(sweep.range.values, sweep.results, strict=True)
    ]
    shown = ", ".join(look.shorten(name, NAME_WIDTH) for name in names)
    layers = [f"layers: of {shown}", ""] if names else []
    return "\n".join(
        [f"{sweep.model}: what the {sweep.range.title} changes", "", *table(rows), "", *layers, told(sweep)]
    )


def _cells(result: Plan | Refusal, names: Sequence[str], fastest: float, look: Look) -> dict[str, str]:
    if isinstance(result, Refusal):
        keys = ("layers", "tok/s", "speed", "all users", "first token", "fullest node")
        return {"fits": "no"} | dict.fromkeys(keys, "") | {"missing": gb(result.missing_bytes)}
    counts = {part.node: part.stop - part.start for part in result.assignments}
    width = len(str(result.num_layers))
    return {
        "fits": "yes",
        "layers": " ".join(str(counts.get(name, "-")).rjust(width) for name in names),
        "tok/s": f"{result.predicted.decode_tok_s:.1f}",
        "speed": single(result.predicted.decode_tok_s / fastest, SPEED_WIDTH, look),
        "all users": f"{result.predicted.throughput_tok_s:.1f}",
        "first token": f"{result.predicted.ttft_s:.2f} s",
        "fullest node": f"{max(fill_of(result).values()):.0%}",
        "missing": "",
    }


def fill_of(plan: Plan) -> dict[str, float]:
    """Of each node with layers, the part of its budget that is taken."""
    return {part.node: part.need_bytes / max(part.budget_bytes, 1) for part in plan.assignments}


def told(sweep: Sweep) -> str:
    """In a sentence, where the limit lies."""
    pairs = list(zip(sweep.range.values, sweep.results, strict=True))
    fit = [value for value, result in pairs if isinstance(result, Plan)]
    refused = [(value, result) for value, result in pairs if isinstance(result, Refusal)]
    if not refused:
        return f"All of them fit, up to {_amount(sweep, fit[-1])}."
    nearest, refusal = refused[-1] if sweep.range.axis == "memory" else refused[0]
    missing = f"with {_amount(sweep, nearest)}, {gb(refusal.missing_bytes)} are missing"
    if not fit:
        return f"None of them fits: {missing}. {refusal.advice}"
    is_upwards = sweep.range.axis == "memory"
    end = f"from {_amount(sweep, fit[0])} on" if is_upwards else f"up to {_amount(sweep, fit[-1])}"
    return f"It fits {end}; {missing}."


def _amount(sweep: Sweep, value: int) -> str:
    unit = _UNITS[sweep.range.axis]
    return f"{value} {unit}{'s' if value != 1 and unit != 'GB' else ''}"


def as_dict(sweep: Sweep, objects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The object that `--json` prints; `objects` are those of the plans, in the order of the values."""
    points = [
        {"value": value, "plan": found} for value, found in zip(sweep.range.values, objects, strict=True)
    ]
    return {"sweep": {"axis": sweep.range.axis, "node": sweep.range.node, "points": points}}
