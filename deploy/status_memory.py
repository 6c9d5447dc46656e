"""The memory part of `macrame status`: what the plan expects of each node, and what is. Pure."""

from __future__ import annotations

from typing import Any

from deploy.narrow import fitted
from planner.sizes import size

_PARTS = ("layers", "embed", "norm", "head", "other")


def render_memory(nodes: list[dict[str, Any]], width: int | None = None) -> list[str]:
    """Two rows for each node with layers, and lines for a draft model and for limits; empty without any."""
    rows = [row for node in nodes for row in _rows(node) if _has_layers(node)]
    lines = (line for node in nodes for line in (*_drafter(node), *_limits(node)))
    return [*fitted(rows, width), *lines]


def _has_layers(node: dict[str, Any]) -> bool:
    return bool(node["node"]["stop"] > node["node"]["start"])


def _rows(node: dict[str, Any]) -> list[dict[str, str]]:
    told, plan = node["node"], node["predicted"]
    memory = told["memory"]
    predicted = {
        **{part: size(plan["weights"][f"{part}_bytes"]) for part in _PARTS},
        "KV": "",
        "most KV": size(plan["kv_bytes"]),
        "scratch": size(plan["activation_bytes"]),
        "sum": size(_weights(plan["weights"]) + plan["kv_bytes"] + plan["activation_bytes"]),
        "MLX now": "",
        "MLX peak": "",
        "MLX cache": "",
        "process": "",
        "peak": "",
    }
    measured = {
        **{part: size(told["footprint"][f"{part}_bytes"]) for part in _PARTS},
        "KV": size(told["kv_bytes"]),
        "most KV": size(memory["peak_kv_bytes"]),
        "scratch": size(memory["activation_bytes"]),
        "sum": size(_weights(told["footprint"]) + memory["peak_kv_bytes"] + memory["activation_bytes"]),
        "MLX now": size(told["active_bytes"]),
        "MLX peak": size(told["peak_bytes"]),
        "MLX cache": size(memory["cache_bytes"]),
        "process": size(memory["rss_bytes"]),
        "peak": size(told["peak_rss_bytes"]),
    }
    return [
        {"rank": str(node["rank"]), "node": node["name"], "memory": "predicted", **predicted},
        {"rank": "", "node": "", "memory": "measured", **measured},
    ]


def _weights(part: dict[str, int]) -> int:
    return sum(part[f"{name}_bytes"] for name in _PARTS)


def _drafter(node: dict[str, Any]) -> list[str]:
    told = node["node"].get("drafter")
    if not told or not told["model"]:
        return []
    return [
        f"rank {node['rank']} ({node['name']}): the draft model {told['model']} has "
        f"{size(told['weight_bytes'])} of weights and {size(told['kv_bytes'])} of keys and values besides"
    ]


def _limits(node: dict[str, Any]) -> list[str]:
    memory = node["node"]["memory"]
    if not memory["memory_limit_bytes"]:
        return []
    return [
        f"rank {node['rank']} ({node['name']}): MLX may take {size(memory['memory_limit_bytes'])}, keep "
        f"{size(memory['cache_limit_bytes'])} of freed buffers, and has "
        f"{size(memory['wired_limit_bytes'])} wired"
    ]
