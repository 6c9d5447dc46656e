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
from pathlib import Path

from cluster.config import ClusterConfig, load_config
from cluster.config_read import ConfigError, show
from cluster.console import look_of
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, UserError
from cluster.plan_arguments import plan_parser, with_arguments
from cluster.plan_choices import choices_of
from cluster.plan_inputs import kv_note, plan_links, plan_nodes, plan_options, read_model
from cluster.plan_output import plan_object, plan_text
from cluster.plan_why import Asked, account_of
from cluster.probe import is_this_machine, this_machine
from cluster.proof import Prover
from cluster.proven_plan import make_proven_plan
from planner.forced import ForcedLayersError
from planner.headers import missing_files
from planner.node_profile import NodeProfile
from planner.plan import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, or why there is none; returns the exit code."""
    args = plan_parser().parse_args(argv)
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


def _run(args: argparse.Namespace) -> int:
    config = with_arguments(load_config(args.config, model=args.model), args)
    model_dir = _model_dir(config)
    model = read_model(config, model_dir)
    for file in missing_files(model_dir):
        print(
            f"plan-dry-run: {file} is missing: its tensors are taken to be as those of other layers, and the "
            "node that owns them will refuse",
            file=sys.stderr,
        )
    nodes = plan_nodes(config, _measured(config))
    options = plan_options(config, model, choices_of(args))
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
    asked = Asked(config, model_dir, model, nodes, plan_links(config), options)
    if args.json:
        warnings = plan.warnings if isinstance(plan, Plan) else ()
        for note in [*proven.notes, *(f"warning: {warning}" for warning in warnings)]:
            _say(note)
        printed = plan_object(plan, model, nodes, options)
        if args.why:
            printed["why"] = account_of(plan, asked, prover).as_dict()
        print(json.dumps(printed, indent=2))
    else:
        notes = [*proven.notes, *kv_note(config)]
        text = plan_text(plan, model, nodes, notes, look_of(sys.stdout))
        print("\n".join([text, *account_of(plan, asked, prover).lines(is_full=args.why)]))
    return EXIT_OK if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def _say(line: str) -> None:
    print(f"plan-dry-run: {line}", file=sys.stderr, flush=True)


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


if __name__ == "__main__":
    sys.exit(main())
