"""`macrame status`: what the nodes of a running ring do, from /v1/cluster."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_UNREACHABLE
from deploy.client import Client
from deploy.command import run_command
from deploy.narrow import fitted, width_of
from deploy.rate import Rate
from deploy.status_edges import render_edges
from deploy.status_kernels import render_kernels
from deploy.status_memory import render_memory
from deploy.target import add_target, client_of
from deploy.watch import add_watch, watch
from planner.sizes import size

_AWAY = {"waiting", "unreachable", "frozen"}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if the ring serves, 4 if it does not because a node is away, else 1."""
    parser = Parser(
        prog="macrame status",
        description="What the nodes of a running ring do: state, layers, memory as planned and as it is, and "
        "the ways between them. The exit code is 0 only if the ring serves.",
        examples=(
            ("macrame status", "the ring at http://127.0.0.1:8080"),
            ("macrame status --watch", "live, with tokens per second, until Ctrl-C"),
            ("macrame status --config cluster.json --json", "the ring of a cluster file, for a script"),
        ),
    )
    add_target(parser)
    add_watch(parser)
    parser.add_argument("--json", action="store_true", help="print /v1/cluster as it is")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame status", lambda: _run(args, client_of(args)), is_verbose=args.verbose)


def _run(args: argparse.Namespace, client: Client) -> int:
    if args.watch:
        return _watch(args, client)
    cluster = client.cluster()
    print(json.dumps(cluster, indent=2) if args.json else render(cluster, width_of(sys.stdout)))
    return exit_code(cluster)


def _watch(args: argparse.Namespace, client: Client) -> int:
    if args.json:
        return watch(
            lambda: json.dumps(client.cluster()),
            args.watch,
            trouble=lambda error: json.dumps({"status": "unreachable", "reason": str(error), "nodes": []}),
        )
    rate = Rate()

    def frame() -> str:
        cluster = client.cluster()
        tok_s = rate.update({"": cluster.get("num_completion_tokens", 0)}, time.monotonic()).get("")
        text = render(cluster, width_of(sys.stdout))
        return text if tok_s is None else f"{text}\n\n{tok_s:.1f} tokens/s in all"

    return watch(frame, args.watch)


def exit_code(cluster: dict[str, Any]) -> int:
    """0 where the ring of this /v1/cluster serves, 4 where it does not because a node is away, else 1."""
    if cluster["status"] == "ok":
        return EXIT_OK
    return EXIT_UNREACHABLE if any(n["state"] in _AWAY for n in cluster["nodes"]) else EXIT_ERROR


def render(cluster: dict[str, Any], width: int | None = None) -> str:
    """The body of /v1/cluster as a few lines and a table, at most `width` columns wide."""
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
    lines += ["", *fitted([_row(node) for node in cluster["nodes"]], width)]
    lines += [
        f"rank {node['rank']} ({node['name']}): {node['reason']}"
        for node in cluster["nodes"]
        if node["reason"]
    ]
    edges = render_edges(cluster["nodes"])
    if edges:
        lines += ["", *edges]
    kernels = render_kernels(cluster["nodes"])
    if kernels:
        lines += ["", *kernels]
    memory = render_memory(cluster["nodes"], width)
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
        "state": _state(node),
        "layers": f"{told['start']}:{told['stop']}" if has_layers else "",
        "weights": size(own_bytes(told["footprint"])) if has_layers else "",
        "KV": size(told["kv_bytes"]),
        "peak memory": size(told["peak_rss_bytes"]),
        "free": f"{size(told['memory']['available_bytes'])} of {size(told['memory']['total_bytes'])}",
        "pressure": told["memory_pressure"],
        "hop": f"{hops[len(hops) // 2]:.2f} ms" if hops else "",
    }


def _state(node: dict[str, Any]) -> str:
    """The state; of a node that loads, with how far it is."""
    told = node["node"]
    if node["state"] != "loading" or not told["load_total_bytes"]:
        return str(node["state"])
    return f"loading {told['loaded_bytes'] / told['load_total_bytes']:.0%}"


def own_bytes(footprint: dict[str, int]) -> int:
    """What a node loaded of the model."""
    return sum(footprint[f"{part}_bytes"] for part in ("layers", "embed", "norm", "head", "other"))


if __name__ == "__main__":
    sys.exit(main())
