"""`macrame status`: what the nodes of a running ring do, from /v1/cluster."""

from __future__ import annotations

import json
import sys
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_UNREACHABLE
from deploy.client import Client
from deploy.command import run_command
from deploy.sizes import size
from deploy.status_edges import render_edges
from deploy.status_memory import render_memory
from deploy.target import add_target, client_of
from planner.render import table

_AWAY = {"waiting", "unreachable", "frozen"}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if the ring serves, 4 if it does not because a node is away, else 1."""
    parser = Parser(prog="macrame status", description="What the nodes of a running ring do.")
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print /v1/cluster as it is")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command(
        "macrame status", lambda: _show(client_of(args), is_json=args.json), is_verbose=args.verbose
    )


def _show(client: Client, *, is_json: bool) -> int:
    cluster = client.get("/v1/cluster")
    print(json.dumps(cluster, indent=2) if is_json else render(cluster))
    return exit_code(cluster)


def exit_code(cluster: dict[str, Any]) -> int:
    """0 where the ring of this /v1/cluster serves, 4 where it does not because a node is away, else 1."""
    if cluster["status"] == "ok":
        return EXIT_OK
    return EXIT_UNREACHABLE if any(n["state"] in _AWAY for n in cluster["nodes"]) else EXIT_ERROR


def render(cluster: dict[str, Any]) -> str:
    """The body of /v1/cluster as a few lines and a table."""
    lines = [f"{cluster['model']}: {cluster['status']}"]
    if cluster["reason"]:
        lines.append(cluster["reason"])
    if cluster.get("plan"):
        lines.append(
            f"context {cluster['context']} tokens, {cluster['num_active']} of {cluster['max_active']} "
            f"requests running, {cluster['num_queued']} queued, "
            f"{cluster['num_completion_tokens']} tokens answered"
        )
    lines += [f"WARNING: {warning}" for warning in cluster.get("warnings", [])]
    lines += [
        f"WARNING: rank {node['rank']} ({node['name']}): {node['node']['certificate_warning']}"
        for node in cluster["nodes"]
        if node["node"]["certificate_warning"]
    ]
    lines += ["", *table([_row(node) for node in cluster["nodes"]])]
    lines += [
        f"rank {node['rank']} ({node['name']}): {node['reason']}"
        for node in cluster["nodes"]
        if node["reason"]
    ]
    edges = render_edges(cluster["nodes"])
    if edges:
        lines += ["", *edges]
    memory = render_memory(cluster["nodes"])
    if memory:
        lines += ["", *memory]
    return "\n".join(lines)


def _row(node: dict[str, Any]) -> dict[str, str]:
    told = node["node"]
    has_layers = told["stop"] > told["start"]
    hops = sorted(told["stats"]["recent_hop_ms"])
    return {
        "rank": str(node["rank"]),
        "node": node["name"],
        "state": node["state"],
        "layers": f"{told['start']}:{told['stop']}" if has_layers else "",
        "weights": size(own_bytes(told["footprint"])) if has_layers else "",
        "KV": size(told["kv_bytes"]),
        "peak memory": size(told["peak_rss_bytes"]),
        "free": f"{size(told['memory']['available_bytes'])} of {size(told['memory']['total_bytes'])}",
        "pressure": told["memory_pressure"],
        "hop": f"{hops[len(hops) // 2]:.2f} ms" if hops else "",
    }


def own_bytes(footprint: dict[str, int]) -> int:
    """What a node loaded of the model."""
    return sum(footprint[f"{part}_bytes"] for part in ("layers", "embed", "norm", "head", "other"))


if __name__ == "__main__":
    sys.exit(main())
