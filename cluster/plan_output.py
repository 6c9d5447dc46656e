"""What `plan-dry-run` prints of a plan or of a refusal: text, or one JSON object. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.bars import PLAIN, Look
from planner.cost import CostModel
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.render import render_plan, render_refusal
from planner.solver import PlanOptions
from planner.workload import Workload


def plan_object(
    result: Plan | Refusal, model: ModelProfile, nodes: Sequence[NodeProfile], options: PlanOptions
) -> dict[str, Any]:
    """The object that `--json` prints."""
    return result.as_dict() if isinstance(result, Plan) else _refused(result, model, nodes, options)


def plan_text(
    result: Plan | Refusal,
    model: ModelProfile,
    nodes: Sequence[NodeProfile],
    notes: Sequence[str],
    look: Look = PLAIN,
) -> str:
    """The table and what it rests on, or why there is none."""
    if isinstance(result, Plan):
        return render_plan(result, nodes, notes, look)
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
    }
