"""The lines of `macrame status` about the ways between nodes. Pure."""

from __future__ import annotations

from typing import Any

from cluster.interfaces import KIND_WORDS


def render_edges(nodes: list[dict[str, Any]]) -> list[str]:
    """One line for each edge that is up and leaves its machine; a warning behind one that goes over Wi-Fi."""
    return [
        f"rank {node['rank']} sends to rank {edge['to_rank']} at {edge['address']}{_by(edge)}"
        for node in nodes
        for edge in node["node"].get("edges", [])
        if edge["is_up"] and edge["kind"] != "loopback"
    ]


def _by(edge: dict[str, Any]) -> str:
    if not edge["kind"]:
        return ""
    text = f" ({' '.join(filter(None, (KIND_WORDS.get(edge['kind'], edge['kind']), edge['interface'])))})"
    return f"{text}: macrame links says what a cable would gain" if edge["kind"] == "wifi" else text
