"""`macrame links`: round trip and bandwidth between the nodes of a running ring, and what they mean.

One thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import grpc

from cluster.arguments import Parser
from cluster.config import ClusterConfig, load_config
from cluster.console import say
from cluster.draft_model import find_drafter, read_drafter
from cluster.errors import EXIT_OK, EXIT_UNREACHABLE, UserError
from cluster.links import Measurement, measure_links
from cluster.links_cost import LinksCost, cost_lines, links_cost
from cluster.links_output import config_links, pair_objects, render_links
from cluster.links_write import write_links
from cluster.plan_inputs import plan_links, plan_options, read_model
from cluster.planning import told_nodes
from cluster.routes import HEAD_RANK
from cluster.rpc import connect
from cluster.tls import Credentials, own_credentials
from deploy.command import run_command
from planner.draft_bytes import with_drafter
from planner.plan import Plan, Refusal
from planner.planned_from import PlannedFrom
from planner.solver import make_plan
from proto import head_pb2, head_pb2_grpc
from shard_loader.hub import resolve_model

ANSWER_S = 3.0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if every pair was measured, 4 if one could not be, 3 for what cannot be asked, else 1."""
    args = _parser().parse_args(argv)
    return run_command("macrame links", lambda: _run(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame links",
        description="Round trip and bandwidth between the nodes of a running ring, over each way that they "
        "have to each other, and what that means for tokens per second.",
        examples=(
            ("macrame links --config cluster.json", "measure, and show what the plan gains or loses"),
            ("macrame links --config cluster.json --write", "and put it into the file, for better plans"),
        ),
    )
    parser.add_argument("--config", type=Path, required=True, help="the ring's cluster file")
    parser.add_argument("--model", help="as the nodes were started with")
    parser.add_argument("--anyway", action="store_true", help="measure although requests are running")
    parser.add_argument(
        "--write", action="store_true", help="put the measured links into the cluster file (JSON only)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, model=args.model)
    credentials = own_credentials(config)
    measurement = measure_links(config, credentials, is_forced=args.anyway, say=_progress)
    links = config_links(measurement)
    cost, why_not = _cost(config, credentials, measurement)
    if args.json:
        found = {
            "links": links,
            "pairs": pair_objects(measurement),
            "predicted": None if cost is None else _predicted(cost),
        }
        print(json.dumps(found, indent=2))
    else:
        told = [why_not] if cost is None else cost_lines(cost, config.concurrency)
        print("\n".join([*render_links(measurement), *told]))
    if args.write and links:
        write_links(args.config, links)
        links_text = "one measured link" if len(links) == 1 else f"{len(links)} measured links"
        say(
            f"macrame links: {args.config} has {links_text} now; copy it to all nodes and "
            "restart them: nodes whose files differ refuse each other"
        )
    return EXIT_OK if measurement.is_complete else EXIT_UNREACHABLE


def _progress(line: str) -> None:
    say(f"macrame links: {line}")


def _cost(
    config: ClusterConfig, credentials: Credentials, measurement: Measurement
) -> tuple[LinksCost | None, str]:
    """What the links mean for the ring's plan; None and why, where that cannot be said here."""
    if all(pair.reasons for pair in measurement.pairs):
        return None, "no prediction: no link was measured"
    try:
        plan, made_from = _running_plan(config, credentials) or _own_plan(config, measurement)
    except (UserError, ValueError) as error:
        return None, f"no prediction: {error}"
    if not isinstance(plan, Plan):
        return None, f"no prediction: {plan.sentence}"
    return links_cost(plan, made_from, measurement.pairs), ""


def _running_plan(config: ClusterConfig, credentials: Credentials) -> tuple[Plan, PlannedFrom] | None:
    """The plan that the head runs; None where it has none yet, or is out of reach. Raises ValueError."""
    head_node = config.nodes[HEAD_RANK]
    with connect(head_node.address, credentials, head_node.name) as channel:
        head = head_pb2_grpc.HeadStub(channel)
        try:
            status = head.GetCluster(head_pb2.ClusterRequest(), timeout=ANSWER_S)
            planning = head.GetPlanning(head_pb2.PlanningRequest(), timeout=ANSWER_S)
        except grpc.RpcError:
            return None
    plan = Plan.from_json(status.plan_json)
    return plan, PlannedFrom.from_plain(json.loads(planning.planning_json))


def _own_plan(config: ClusterConfig, measurement: Measurement) -> tuple[Plan | Refusal, PlannedFrom]:
    """The plan that the head would make of what is known here. Raises UserError or ValueError."""
    folder = resolve_model(config.model, config.model_dir_base)
    model, links = read_model(config, folder), tuple(plan_links(config))
    options, found = plan_options(config, model), find_drafter(config)
    draft = None if found is None else read_drafter(config, found[0], folder)
    nodes = told_nodes(config, measurement.profiles, model)
    nodes = with_drafter(nodes, draft, options.context, options.concurrency)
    made_from = PlannedFrom(model, tuple(nodes), links, options)
    return make_plan(model, nodes, links, made_from.options), made_from


def _predicted(cost: LinksCost) -> dict[str, object]:
    return {
        "assumed": asdict(cost.assumed),
        "measured": asdict(cost.measured),
        "wifi": [{"between": list(one.pair.names), "by_cable": asdict(one.wired)} for one in cost.wifi],
        "planned_anew": None if cost.better is None else asdict(cost.better),
    }


if __name__ == "__main__":
    sys.exit(main())
