"""`plan-dry-run`: which node would own which layers, how fast that would be, and why it does not fit.

Reads the cluster file, config.json and safetensors headers; loads no weights and connects to no node. Of a
hub id that is not here it fetches config, tokenizer and headers. Which cuts of the model are exact is proven
in a process of its own where that is not known yet. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.config import OBJECTIVES, STRATEGIES, ClusterConfig, load_config
from cluster.config_nodes import parse_layers
from cluster.config_read import ConfigError, nearest, show
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, UserError
from cluster.plan_inputs import kv_note, plan_links, plan_nodes, plan_options, read_model
from cluster.probe import is_this_machine, this_machine
from cluster.proof import Prover
from cluster.proven_plan import make_proven_plan
from planner.cost import CostModel, Workload
from planner.forced import ForcedLayersError
from planner.headers import read_checkpoint
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan, Refusal
from planner.render import render_plan, render_refusal
from planner.solver import PlanOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, or why there is none; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"plan-dry-run: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        print(
            f"plan-dry-run: {type(error).__name__}: {error}; --verbose shows where, please report it",
            file=sys.stderr,
        )
        return EXIT_ERROR


def _parser() -> Parser:
    parser = Parser(
        prog="plan-dry-run", description="Plan a cluster without loading weights or connecting to nodes."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the cluster's JSON or YAML file, or a hostfile"
    )
    parser.add_argument("--model", help="a folder or a hub id, instead of the config's")
    parser.add_argument("--strategy", choices=STRATEGIES, help="how to split the layers")
    parser.add_argument("--objective", choices=OBJECTIVES, help="what the optimal strategy makes best")
    parser.add_argument(
        "--context", type=_positive, metavar="N", help="tokens of one request, prompt and answer"
    )
    parser.add_argument("--concurrency", type=_positive, metavar="N", help="requests at once")
    parser.add_argument(
        "--layers",
        action="extend",
        nargs="+",
        metavar="NODE=A:B",
        help="force layers A to B (B not included) onto a node; replaces all forced layers of the config",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return value


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, model=args.model).with_overrides(
        context=args.context, concurrency=args.concurrency, strategy=args.strategy, objective=args.objective
    )
    config = _with_layers(config, args.layers)
    model_dir = _model_dir(config)
    model = read_model(config, model_dir)
    for file in read_checkpoint(model_dir).missing:
        print(
            f"plan-dry-run: {file} is missing: its tensors are taken to be as those of other layers, and the "
            "node that owns them will refuse",
            file=sys.stderr,
        )
    nodes = plan_nodes(config, _measured(config))
    options = plan_options(config, model)
    if options.context > model.max_context:
        print(
            f"plan-dry-run: the context {options.context} is beyond the {model.max_context} tokens that "
            f"{model.name} was made for",
            file=sys.stderr,
        )
    try:
        prover = Prover(model_dir, threading.Event(), _say)
        proven = make_proven_plan(model, nodes, plan_links(config), options, prover, is_together=False)
    except ForcedLayersError as error:
        raise ConfigError(f"{config.path}: {error}") from None
    plan = proven.result
    if args.json:
        for note in proven.notes:
            _say(note)
        print(
            json.dumps(
                plan.as_dict() if isinstance(plan, Plan) else _refused(plan, model, nodes, options), indent=2
            )
        )
    elif isinstance(plan, Plan):
        print(render_plan(plan, nodes, [*proven.notes, *kv_note(config)]))
    else:
        print(render_refusal(plan, model.name, nodes))
    return EXIT_OK if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def _say(line: str) -> None:
    print(f"plan-dry-run: {line}", file=sys.stderr, flush=True)


def _refused(
    refusal: Refusal, model: ModelProfile, nodes: Sequence[NodeProfile], options: PlanOptions
) -> dict[str, Any]:
    """The keys of a plan, for none."""
    full_bytes = CostModel(model, nodes, (), Workload(options.context, options.concurrency)).weight_bytes(
        0, model.num_layers
    )
    return {
        "model": model.name,
        "digest": None,
        "strategy": options.strategy,
        "objective": options.objective,
        "fits": False,
        "num_layers": model.num_layers,
        "context": options.context,
        "concurrency": options.concurrency,
        "assignments": [],
        "unused_nodes": [node.name for node in nodes],
        "predicted": None,
        "memory": {"full_model_bytes": full_bytes, "largest_node_bytes": 0, "saved_bytes": full_bytes},
        "refusal": {
            "reason": refusal.reason,
            "missing_bytes": refusal.missing_bytes,
            "advice": refusal.advice,
        },
    }


def _model_dir(config: ClusterConfig) -> Path:
    from shard_loader.hub import HubError, resolve_model  # huggingface_hub takes a while

    try:
        return resolve_model(config.model, config.model_dir_base)
    except HubError as error:
        raise ConfigError(f"{config.path}: model = {show(config.model)}: {error}") from None


def _measured(config: ClusterConfig) -> dict[int, NodeProfile]:
    """This machine, for each node on it that the file does not describe."""
    return {
        node.rank: this_machine()
        for node in config.nodes
        if node.use and (node.memory_gb is None or node.chip is None) and is_this_machine(node.host)
    }


def _with_layers(config: ClusterConfig, texts: Sequence[str] | None) -> ClusterConfig:
    """The config with the layers that the command line forces, and none but those."""
    if not texts:
        return config
    forced: dict[str, tuple[int, int]] = {}
    names = [node.name for node in config.nodes]
    for text in texts:
        name, _, layers = text.rpartition("=")
        if name not in names:
            near = nearest(name, names)
            hint = f", the nearest is {show(near)}" if near else f": the nodes are {', '.join(names)}"
            raise ConfigError(f"--layers {text}: {show(name)} is no node{hint}")
        if name in forced:
            raise ConfigError(f"--layers {text}: {show(name)} is given twice")
        try:
            forced[name] = parse_layers(layers)
        except ValueError as error:
            raise ConfigError(f"--layers {text}: the layers {error}") from None
    nodes = tuple(replace(node, layers=forced.get(node.name)) for node in config.nodes)
    for node in nodes:
        if node.layers is not None and not node.use:
            raise ConfigError(f'--layers {node.name}=...: that node has "use": false')
    return replace(config, nodes=nodes)


if __name__ == "__main__":
    sys.exit(main())
