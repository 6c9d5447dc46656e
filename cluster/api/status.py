"""What /health and /v1/cluster say, from the head's newest status. Pure but for reading the head client."""

from __future__ import annotations

import json
import math
from typing import Any

from google.protobuf.message import Message

from cluster.api.head_client import HeadClient
from planner.plan import Plan

_STATES = ("starting", "loading", "degraded")


def state(head: HeadClient, is_tokenizer_loaded: bool) -> tuple[str, str]:
    """ok, starting, loading or degraded, and why in one sentence (empty for ok)."""
    if head.trouble:
        return ("starting" if head.status is None else "degraded"), head.trouble
    assert head.status is not None  # no trouble means that it was heard
    if head.status.status != "ok":
        known = head.status.status if head.status.status in _STATES else "degraded"
        return known, head.status.reason or f"The ring is {known}."
    if not is_tokenizer_loaded:
        return "loading", "The tokenizer is being loaded."
    return "ok", ""


def health(head: HeadClient, is_tokenizer_loaded: bool) -> dict[str, Any]:
    """The body of /health."""
    name, reason = state(head, is_tokenizer_loaded)
    if name == "ok":
        warnings = _warnings(head)
        return {"status": "ok"} | ({"warnings": warnings} if warnings else {})
    nodes = [{key: node[key] for key in ("rank", "name", "state", "reason")} for node in _nodes(head)]
    return {"status": name, "reason": reason, "nodes": nodes}


def cluster(head: HeadClient, is_tokenizer_loaded: bool, model: str) -> dict[str, Any]:
    """The body of /v1/cluster: the plan, and all that the head knows of its nodes."""
    name, reason = state(head, is_tokenizer_loaded)
    content: dict[str, Any] = {"object": "cluster", "model": model, "status": name, "reason": reason}
    status = head.status
    if status is None:
        return content | {"plan": None, "requests": [], "nodes": []}
    plain = to_plain(status)
    for request in plain["requests"]:
        request["model"] = request["adapter"] or model
    for key in ("status", "reason", "plan_json", "ranks"):
        del plain[key]
    plan = json.loads(status.plan_json) if status.plan_json else None
    return content | plain | {"plan": plan, "warnings": _warnings(head), "nodes": _nodes(head)}


def _warnings(head: HeadClient) -> list[str]:
    """What a plan that was forced beyond its budgets risks, one sentence for each such node."""
    if head.status is None or not head.status.plan_json:
        return []
    return list(Plan.from_json(head.status.plan_json).warnings)


def to_plain(message: Message) -> dict[str, Any]:
    """A message as JSON values: every field, enums by name, 64-bit numbers as numbers."""
    content: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        content[field.name] = (
            [_plain(field, one) for one in value] if field.is_repeated else _plain(field, value)
        )
    return content


def _plain(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    if isinstance(value, Message):
        return to_plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _nodes(head: HeadClient) -> list[dict[str, Any]]:
    """The ranks; where the head itself is out of reach, rank 0 is shown as it stands."""
    nodes = [] if head.status is None else [to_plain(rank) for rank in head.status.ranks]
    if head.trouble:
        for node in nodes:
            if node["rank"] == 0:
                node["state"] = "frozen" if head.is_silent else "unreachable"
                node["reason"] = head.trouble
    return nodes
