"""One row for each node of `macrame up`: its process and what the head knows of it, put together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.up_board import NodeView, Phase
from deploy.up_follow import Seen
from planner.sizes import size

GOOD, BUSY, BAD = "green", "yellow", "red"
_STYLES = {
    "ready": GOOD,
    "idle": GOOD,
    **dict.fromkeys(("failed", "frozen", "unreachable", "ended", "away"), BAD),
    "stopped": "dim",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown of a node."""

    rank: int
    name: str
    where: str
    state: str
    note: str = ""  # why, in a sentence
    done: float | None = None  # 0 to 1, of what is being loaded
    layers: str = ""
    tok_s: str = ""
    memory: str = ""
    link: str = ""  # to the next node
    num_restarts: int = 0

    @property
    def style(self) -> str:
        """A colour of rich."""
        return _STYLES.get(self.state, BUSY)

    @property
    def is_over(self) -> bool:
        """It does not run, or is about to end."""
        return self.state in ("stopping", "stopped", "ended", "away")

    @property
    def told(self) -> str:
        """State and progress as text; the same text again is no news."""
        done = "" if self.done is None else f" {int(self.done * 10) * 10} %"
        why = f": {self.note}" if self.note else ""
        return f"{self.state}{done}{why}"


def rows_of(views: Sequence[NodeView], seen: Seen) -> list[Row]:
    """By rank."""
    known = {node["rank"]: node for node in (seen.cluster or {}).get("nodes", ())}
    return [_row(view, known.get(view.rank), seen) for view in views]


def _row(view: NodeView, node: dict[str, Any] | None, seen: Seen) -> Row:
    base = Row(view.rank, view.name, view.where, view.phase.value, view.note, num_restarts=view.num_restarts)
    if view.phase is not Phase.RUNNING:
        return base
    if node is None:
        return _changed(base, state="starting") if view.is_new else base
    told = node["node"]
    state = str(node["state"])
    reason = "" if state in ("ready", "idle") else str(node["reason"])
    total, loaded = told["load_total_bytes"], told["loaded_bytes"]
    has_layers = told["stop"] > told["start"]
    return _changed(
        base,
        state=state,
        note=reason,
        done=loaded / total if state == "loading" and total else None,
        layers=f"{told['start']}:{told['stop']}" if has_layers else "",
        tok_s=f"{seen.stage_tok_s.get(view.rank, 0.0):.1f}" if has_layers and state == "ready" else "",
        memory=_memory(told),
        link=_link(told),
    )


def _changed(row: Row, **values: Any) -> Row:
    return Row(**{field: getattr(row, field) for field in row.__slots__} | values)


def _memory(told: dict[str, Any]) -> str:
    memory = told["memory"]
    if not memory["total_bytes"]:
        return ""
    pressure = told["memory_pressure"]
    text = f"{size(memory['rss_bytes'])}, {size(memory['available_bytes'])} free"
    return text if pressure in ("", "normal") else f"{text}, {pressure}"


def _link(told: dict[str, Any]) -> str:
    """The way to the next stage, and half a round trip of it."""
    hops = sorted(told["stats"]["recent_hop_ms"])
    kinds = {edge["kind"] for edge in told.get("edges", []) if edge["is_up"] and edge["kind"]}
    parts = [f"{hops[len(hops) // 2]:.2f} ms"] if hops else []
    return " ".join([*parts, *sorted(kinds - {"loopback"})])


def headline(seen: Seen) -> str:
    """One line about the whole ring."""
    cluster = seen.cluster
    if cluster is None or seen.status != "ok":
        return f"{seen.status}: {seen.reason}" if seen.reason else seen.status
    return (
        f"{cluster['model']} at {seen.url}/v1: {cluster['num_active']} of {cluster['max_active']} requests, "
        f"{cluster['num_queued']} queued, {seen.answer_tok_s:.1f} tokens/s"
    )
