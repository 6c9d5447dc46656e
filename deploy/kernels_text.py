"""What `macrame kernels` found, as tables for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.render import table
from planner.sizes import size

if TYPE_CHECKING:
    from deploy.kernel_forms import Form, MatrixForm
    from kernels.self_test import Trial
    from kernels.verdicts import Machine, Verdict


@dataclass(frozen=True, slots=True)
class Result:
    """What one form gave. verdicts: of the classes of which every size was tried."""

    form: Form | MatrixForm
    name: str
    layer_bytes: int
    num_layers: int
    trials: list[Trial]
    verdicts: list[Verdict]


def results_text(machine: Machine, results: Sequence[Result]) -> str:
    """A table for each form of block, and what a node would use."""
    lines = [
        f"{machine.chip}, {machine.system}, MLX {machine.mlx}: {machine.backend} kernels {machine.kernels}"
    ]
    for result in results:
        lines += ["", f"{result.form.name}: {result.name}", *table(_rows(result.trials))]
        lines += [f"{t.num_tokens} tokens: {t.failure}" for t in result.trials if t.failure]
        lines.append(_conclusion(result))
    return "\n".join(lines)


def _rows(trials: Sequence[Trial]) -> list[dict[str, str]]:
    """A column that would be empty is left out."""
    rows = [_row(trial) for trial in trials]
    return [{key: row[key] for key in row if any(other[key] for other in rows)} for row in rows]


def _row(trial: Trial) -> dict[str, str]:
    row = {
        "tokens": str(trial.num_tokens),
        "answer": "FAILED" if trial.failure else "right",
        "error": f"{trial.error:.1e}" if trial.error else "",
        "launches": str(trial.num_launches or ""),
    }
    times = trial.times
    if times is None:
        return row | dict.fromkeys(("kernels", "MLX", "ratio", "GB/s"), "")
    return row | {
        "kernels": f"{times.ours_us:.1f} us",
        "MLX": f"{times.mlx_us:.1f} us",
        "ratio": f"{times.ratio:.2f}",
        "GB/s": f"{times.gb_s:.0f}",
    }


def _conclusion(result: Result) -> str:
    if not any(trial.times for trial in result.trials):
        experts = f"{result.form.num_experts} experts of " if result.form.num_experts else ""
        return f"nothing was timed; {experts}random weights, {size(result.layer_bytes)}"
    used = [
        str(v.first) if v.first == v.last else f"{v.first} to {v.last}" for v in result.verdicts if v.is_taken
    ]
    what = (
        f"a node would use them for {', '.join(used)} tokens" if used else "a node would use MLX's operations"
    )
    return f"{what}; {result.num_layers} layers of random weights, {size(result.layer_bytes)} each"
