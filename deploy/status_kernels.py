"""The lines of `macrame status` about kernels for expert layers and EXL3 matrices. Pure."""

from __future__ import annotations

from itertools import groupby
from typing import Any


def render_kernels(nodes: list[dict[str, Any]]) -> list[str]:
    """A line for each form of block or matrix of each node that has some, or why it uses no kernels."""
    return [line for node in nodes for line in _lines(node)]


def _lines(node: dict[str, Any]) -> list[str]:
    told = node["node"].get("kernels")
    counts = {"experts": told["num_layers"], "EXL3": told.get("num_matrices", 0)} if told else {}
    what = " and ".join(name for name, count in counts.items() if count)
    if not told or not what:
        return []
    who = f"rank {node['rank']} ({node['name']}): "
    lines = [f"{who}MLX's operations for {what}: {told['reason']}"] if told["reason"] else []
    for block, verdicts in groupby(told["verdicts"], key=lambda one: one["block"]):
        lines.append(f"{who}{_of_block(list(verdicts), told['backend'])} ({_short(block)})")
    return lines


def _of_block(verdicts: list[dict[str, Any]], backend: str) -> str:
    taken = [one for one in verdicts if one["is_taken"]]
    if not taken:
        what = "EXL3" if verdicts[0]["block"].startswith("exl3 ") else "experts"
        return f"MLX's operations for {what}: {verdicts[0]['reason']}"
    ratios = [one["mlx_us"] / one["ours_us"] for one in taken if one["ours_us"]]
    gain = f", {_range(min(ratios), max(ratios))} times as fast as MLX's" if ratios else ", not timed"
    trouble = [f"; {_sizes([one])}: {one['reason']}" for one in verdicts if _is_trouble(one)]
    if untested := [one for one in verdicts if one.get("is_untested")]:
        trouble.append(f"; {_sizes(untested)}: {untested[0]['reason']}")
    return f"kernels ({backend}) for {_sizes(taken)} tokens{gain}{''.join(trouble)}"


def _is_trouble(verdict: dict[str, Any]) -> bool:
    """Whether a kernel was wrong or failed, which is more than to be slow or not to be."""
    is_tried = verdict["error"] or "Error: " in verdict["reason"]
    return bool(is_tried and not verdict["is_taken"] and not verdict["ours_us"])


def _sizes(taken: list[dict[str, Any]]) -> str:
    """Ranges that touch are one."""
    spans: list[tuple[int, int]] = []
    for one in taken:
        first, last = one["first_tokens"], one["last_tokens"]
        if spans and spans[-1][1] + 1 == first:
            spans[-1] = spans[-1][0], last
        else:
            spans.append((first, last))
    return ", ".join(_span(*span) for span in spans)


def _span(first: int, last: int) -> str:
    if not last:
        return f"{first} and more"
    return str(first) if first == last else f"{first} to {last}"


def _range(low: float, high: float) -> str:
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def _short(block: str) -> str:
    """Its numbers and sizes, without the formats."""
    return block.partition(", gate ")[0]
