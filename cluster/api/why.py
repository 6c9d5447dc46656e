"""Why the running plan is as it is, for `GET /v1/cluster/why`: reckoned once for each plan. Event loop only.

The reckoning takes up to about a second of Python, so it runs in a thread beside the streams.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cluster.api.errors import ApiError, unavailable
from cluster.api.head_client import HeadClient


class PlanWhy:
    """The account of the plan that the head has now."""

    def __init__(self, head: HeadClient) -> None:
        self._head = head
        self._lock = asyncio.Lock()  # several who ask at once wait for one reckoning
        self._plan_json = ""
        self._found: dict[str, Any] = {}

    async def get(self) -> dict[str, Any]:
        """`digest`, `help` and `lines` in words, and Why.as_dict(); raises ApiError 503 without a plan."""
        async with self._lock:
            status = self._head.status
            if status is None or not status.plan_json:
                raise unavailable(self._head.trouble or "The head has no plan yet; ask again when it serves.")
            if status.plan_json != self._plan_json:
                planning = await self._head.planning()
                self._found = await asyncio.to_thread(_reckon, status.plan_json, planning)
                self._plan_json = status.plan_json
            return self._found


def _reckon(plan_json: str, planning_json: str) -> dict[str, Any]:
    """Any thread. Raises ApiError for what cannot be read: a head of another version."""
    from planner.plan import Plan  # what only this needs of the planner
    from planner.planned_from import PlannedFrom
    from planner.why import explain_plan

    try:
        plan = Plan.from_json(plan_json)
        planned = PlannedFrom.from_plain(json.loads(planning_json)["planning"])
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(
            502, f"The head says what cannot be read: {error}.", kind="server_error", code="bad_head"
        ) from error
    why = explain_plan(plan, planned.model, planned.nodes, planned.links, planned.options)
    title, *gains = why.best_gains() or [""]
    return {
        "digest": plan.digest,
        "help": [gain.strip() for gain in gains] or [title.partition(": ")[2]] * bool(title),
        "lines": why.lines(is_full=True),
        **why.as_dict(),
    }
