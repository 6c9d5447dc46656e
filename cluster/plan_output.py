"""What `plan-dry-run` prints of a plan or of a refusal: text, or one JSON object. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from planner.bars import PLAIN, Look
from planner.compare import Compared, render_compared
from planner.cost import CostModel
from planner.draft_bytes import drafter_on
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.render import render_plan, render_refusal
from planner.solver import PlanOptions
from planner.workload import Workload


def plan_object(
    result: Plan | Refusal,
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    options: PlanOptions,
    compared: Sequence[Compared] = (),
) -> dict[str, Any]:
    """The object that `--json` prints; compared: with `--compare`."""
    told = result.as_dict() if isinstance(result, Plan) else _refused(result, model, nodes, options)
    return told | ({"strategies": [row.as_dict() for row in compared]} if compared else {})


def plan_text(
    result: Plan | Refusal,
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    notes: Sequence[str],
    look: Look = PLAIN,
    *,
    compared: Sequence[Compared] = (),
) -> str:
    """The table, what it rests on and what other strategies would make, or why there is none."""
    if isinstance(result, Plan):
        text = render_plan(result, nodes, notes, look)
        return "\n".join([text, "", *render_compared(compared)]) if compared and result.fits else text
    return render_refusal(result, model.name, nodes, look)


def _refused(
    refusal: Refusal, model: ModelProfile, nodes: Sequence[NodeProfile], options: PlanOptions
) -> dict[str, Any]:
    """The keys of a plan, for none."""
    full_bytes = CostModel(model, nodes, (), Workload(options.context, options.concurrency)).weight_bytes(
        0, model.num_layers
    )
    return {
        "model": model.name,
        "digest": None,
        "strategy": options.strategy,
        "objective": options.objective,
        "fits": False,
        "num_layers": model.num_layers,
        "context": options.context,
        "concurrency": options.concurrency,
        "assignments": [],
        "unused_nodes": [node.name for node in nodes],
        "predicted": None,
        "memory": {"full_model_bytes": full_bytes, "largest_node_bytes": 0, "saved_bytes": full_bytes},
        "refusal": {
            "reason": refusal.reason,
            "missing_bytes": refusal.missing_bytes,
            "advice": refusal.advice,
        },
    } | ({} if (part := drafter_on(nodes)) is None else {"drafter": asdict(part)})
