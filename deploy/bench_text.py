"""What `macrame bench` prints for people. Pure."""

from __future__ import annotations

from typing import Any

from cluster.bench_plot import told
from deploy.narrow import fitted


def render(result: dict[str, Any], width: int | None = None) -> str:
    """The object of `macrame bench --json` as tables, at most `width` columns wide."""
    lines = [f"{result['model']}: {told(result)}, seed {result['seed']}", ""]
    lines += fitted([_run(run) for run in result["runs"]], width)
    if not all(run["is_whole"] for run in result["runs"]):
        lines.append("* interrupted: the figures until then")
    stages = result["stages"]
    names = ", ".join(f"{stage['node']} {stage['start']}:{stage['stop']}" for stage in stages)
    lines += ["", f"stages: {names}", "", *fitted([_node(node) for node in result["nodes"]], width)]
    return "\n".join(lines)


def _run(run: dict[str, Any]) -> dict[str, str]:
    hop = run["hop_ms"]["p50"]
    return {
        "users": f"{run['concurrency']}{'' if run['is_whole'] else '*'}",
        "answers": str(run["num_requests"]),
        "tok/s of all": f"{run['aggregate_tok_s']:.1f}",
        "of one": f"{run['decode_tok_s']:.1f}",
        "TTFT ms p50 p90 p99": _three(run["ttft_ms"], 0),
        "gap ms p50 p90 p99": _three(run["gap_ms"], 1),
        "hop ms": "-" if hop is None else f"{hop:.2f}",
        "CPU ms/tok": f"{run['cpu_ms_per_token']:.1f}",
        "stage busy %": " ".join(f"{share * 100:.0f}" for share in run["stage_busy"]),
    }


def _three(percentiles: dict[str, float | None], digits: int) -> str:
    values = (percentiles[key] for key in ("p50", "p90", "p99"))
    return " ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def _node(node: dict[str, Any]) -> dict[str, str]:
    return {
        "rank": str(node["rank"]),
        "weights GB": f"{node['weight_bytes'] / 1e9:.3f}",
        "in use GB": f"{node['actual_memory_usage_gb']:.3f}",
        "saved GB": f"{node['memory_saved_gb']:.3f}",
        "peak RSS GB": f"{node['peak_rss_bytes'] / 1e9:.3f}",
    }
