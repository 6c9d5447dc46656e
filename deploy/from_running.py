"""`macrame plan --from-running`: asks a running ring what its stages and hops take, and says whether another
plan would be better. It changes nothing."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from cluster.arguments import Parser
from cluster.config import OBJECTIVES, load_config
from cluster.errors import EXIT_ERROR, EXIT_OK, UserError
from deploy.advice import advice_object, advice_text
from deploy.client import Client
from deploy.command import run_command
from deploy.status import exit_code
from deploy.target import add_target, client_of
from planner.measured import MeasuresError, StageTimes, TooFewStepsError
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.rebalance import Advice, NoAdviceError, advise


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with any advice, also to leave the plan; 4 where the ring or a node is away, else 1."""
    parser = Parser(
        prog="macrame plan --from-running",
        description="What another plan would gain a ring that runs, by the stage and hop times that it "
        "measured. Changes nothing.",
        examples=(
            ("macrame plan --from-running", "ask the ring at http://127.0.0.1:8080"),
            (
                "macrame plan --from-running --config cluster.json --json",
                "the ring of a file, as JSON",
            ),
        ),
    )
    add_target(parser)
    parser.add_argument(
        "--objective", choices=OBJECTIVES, help="what to make best (default: what the ring was planned for)"
    )
    parser.add_argument(
        "--keep-layers",
        action="store_true",
        help="layers that the ring's cluster file forces onto nodes stay there",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame plan --from-running", lambda: _run(args), is_verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    client = client_of(args)
    cluster = client.get("/v1/cluster")
    if "status" not in cluster or "nodes" not in cluster:
        raise UserError(f"{client.url} is not macrame's API; give the head's with --url or --config")
    if cluster["status"] != "ok":
        reason = cluster.get("reason") or "its state is unknown"
        raise UserError(
            f"the ring at {client.url} does not serve, so nothing can be measured: {reason}",
            exit_code(cluster) or EXIT_ERROR,
        )
    reply = client.get("/v1/cluster/planning")
    advice = _advise(args, client, cluster, reply)
    notes = _changed(args, reply)
    print(
        json.dumps(advice_object(advice), indent=2) if args.json else "\n".join([advice_text(advice), *notes])
    )
    if args.json:
        for note in notes:
            print(note, file=sys.stderr)
    return EXIT_OK


def _advise(
    args: argparse.Namespace, client: Client, cluster: dict[str, Any], reply: dict[str, Any]
) -> Advice:
    try:
        planned = PlannedFrom.from_plain(reply.get("planning"))
        plan = Plan.from_json(json.dumps(cluster["plan"]))
        times, hops = _measures(cluster)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{client.url} says what cannot be read: {error}") from error
    try:
        return advise(planned, plan, times, hops, objective=args.objective, keeps_forced=args.keep_layers)
    except TooFewStepsError as error:
        raise UserError(
            f"{error}: let the ring generate {error.num_missing} more tokens first, such as with "
            f"'macrame bench --url {client.url} --concurrency 1', and ask again"
        ) from error
    except (MeasuresError, NoAdviceError) as error:
        raise UserError(str(error)) from error


def _measures(
    cluster: dict[str, Any],
) -> tuple[dict[int, StageTimes], dict[tuple[int, int], list[float]]]:
    """By rank, and by the ranks that a hop is between. Raises ValueError, KeyError or TypeError."""
    times: dict[int, StageTimes] = {}
    hops: dict[tuple[int, int], list[float]] = {}
    for node in cluster["nodes"]:
        rank, stats = int(node["rank"]), node["node"]["stats"]
        if len(stats["decode_ms"]) != len(stats["decode_position"]):
            raise ValueError(f"rank {rank} tells {len(stats['decode_ms'])} decode steps without positions")
        if len(stats["decode_rows"]) not in (0, len(stats["decode_ms"])):
            raise ValueError(f"rank {rank} tells {len(stats['decode_ms'])} decode steps without their rows")
        times[rank] = StageTimes(
            decode_ms=_floats(stats["decode_ms"]),
            decode_position=tuple(map(int, stats["decode_position"])),
            decode_rows=tuple(map(int, stats["decode_rows"])),
            chunk_ms=_floats(stats["chunk_ms"]),
            chunk_tokens=tuple(map(int, stats["chunk_tokens"])),
            chunk_position=tuple(map(int, stats["chunk_position"])),
            uptime_ms=float(stats["uptime_ms"] or 0.0),
        )
        for to_rank, ms in zip(stats["recent_hop_rank"], _floats(stats["recent_hop_ms"]), strict=True):
            hops.setdefault((rank, int(to_rank)), []).append(ms)
    return times, hops


def _floats(values: Sequence[float | None]) -> tuple[float, ...]:
    """A null stands for what is no number."""
    return tuple(math.nan if value is None else float(value) for value in values)


def _changed(args: argparse.Namespace, reply: dict[str, Any]) -> list[str]:
    """A line where the cluster file is not the one that the ring runs with."""
    if args.config is None or load_config(args.config).digest == reply.get("config_digest"):
        return []
    return [
        f"note: {args.config} is not what the ring was started with (an edit, or another --model): the "
        "advice is for the ring as it runs"
    ]
