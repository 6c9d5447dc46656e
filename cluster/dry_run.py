"""`plan-dry-run`: which node would own which layers, how fast that would be, and why it does not fit.

Reads the cluster file, config.json and safetensors headers; loads no weights and connects to no node. Of a
hub id that is not here it fetches config, tokenizer and headers. Which cuts of the model are exact is proven
in a process of its own where that is not known yet. One thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cluster.border import drop_output, open_missing_streams, unforeseen
from cluster.config import ClusterConfig, load_config
from cluster.config_read import ConfigError, show
from cluster.console import look_of, show_anything
from cluster.draft_model import find_drafter, read_drafter
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_ERROR, EXIT_OK, UserError
from cluster.plan_arguments import plan_parser, with_arguments
from cluster.plan_asker import PlanAsker
from cluster.plan_choices import choices_of
from cluster.plan_inputs import is_same_chip, kv_note, precision_note, read_model
from cluster.plan_output import plan_text
from cluster.plan_plot import draw_plan
from cluster.plan_why import account_of
from cluster.probe import is_this_machine, this_machine
from cluster.sweep import swept
from cluster.sweep_plot import draw_sweep
from planner.headers import missing_files
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Plan
from planner.sweep import Sweep, render_sweep
from planner.sweep import as_dict as sweep_object
from shard_loader.folder import find_folder
from shard_loader.sources import HubError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, or why there is none; returns the exit code."""
    args = plan_parser().parse_args(argv)
    failure: Exception
    open_missing_streams()
    show_anything(sys.stdout)
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        failure, message, code = error, str(error), error.exit_code
    except BrokenPipeError:  # the reader had enough, as `head` has
        drop_output()
        return EXIT_ERROR
    except Exception as error:  # the border of main
        failure, message, code = error, unforeseen(error), EXIT_ERROR
    if args.verbose:
        traceback.print_exception(failure)
    print(f"plan-dry-run: {message}", file=sys.stderr)
    return code


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
    found = find_drafter(config)
    draft = None if found is None else read_drafter(config, found[0], model_dir)
    ask = PlanAsker(model, model_dir, _measured(config), choices_of(args), _say, draft=draft)
    if args.sweep is not None:
        return _sweep(config, args, ask)
    asked = ask(config)
    _warn_of_context(model, asked.options.context)
    plan, notes = asked.proven.result, asked.proven.notes
    if args.plot is not None:
        draw_plan(plan, asked.cost, args.plot)
    compared = asked.compared(is_quick=not args.compare) if args.compare or not args.json else []
    if args.json:
        warnings = plan.warnings if isinstance(plan, Plan) else ()
        for note in [*notes, *(f"warning: {warning}" for warning in warnings)]:
            _say(note)
        why = {"why": account_of(asked, config, model_dir, is_quick=False).as_dict()} if args.why else {}
        print(json.dumps(asked.as_dict(compared) | why, indent=2))
    else:
        lines, look = [*notes, *kv_note(config), *precision_note(model)], look_of(sys.stdout)
        text = plan_text(plan, model, asked.nodes, lines, look, compared=compared)
        account = account_of(asked, config, model_dir, is_quick=not args.why)
        print("\n".join([text, *account.lines(is_full=args.why)]))
    return EXIT_OK if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def _sweep(config: ClusterConfig, args: argparse.Namespace, ask: PlanAsker) -> int:
    """A plan for each value that --sweep names."""
    asked = [ask(changed) for changed in swept(config, args.sweep)]
    _warn_of_context(ask.model, max(one.options.context for one in asked))
    for note in dict.fromkeys(note for one in asked for note in one.proven.notes):
        _say(note)
    results = tuple(one.proven.result for one in asked)
    sweep = Sweep(ask.model.name, args.sweep, tuple(node.name for node in config.nodes), results)
    if args.plot is not None:
        draw_sweep(sweep, args.plot)
    if args.json:
        print(json.dumps(sweep_object(sweep, [one.as_dict() for one in asked]), indent=2))
    else:
        print(render_sweep(sweep, look_of(sys.stdout)))
    return EXIT_OK if sweep.plans else EXIT_DOES_NOT_FIT


def _warn_of_context(model: ModelProfile, context: int) -> None:
    if context > model.max_context:
        _say(f"the context {context} is beyond the {model.max_context} tokens that {model.name} was made for")


def _say(line: str) -> None:
    print(f"plan-dry-run: {line}", file=sys.stderr, flush=True)


def _model_dir(config: ClusterConfig) -> Path:
    try:
        folder = find_folder(config.model, config.model_dir_base)
        if folder is None:
            from shard_loader.hub import resolve_model  # huggingface_hub takes a while

            folder = resolve_model(config.model, config.model_dir_base)
        return folder
    except HubError as error:
        raise ConfigError(f"{config.path}: model = {show(config.model)}: {error}") from None


def _measured(config: ClusterConfig) -> dict[int, NodeProfile]:
    """This machine, for each node on it that the file does not describe, or describes as it is."""
    local = [node for node in config.nodes if node.use and is_this_machine(node.host)]
    return {
        node.rank: this_machine(node.device)
        for node in local
        if node.memory_gb is None
        or node.chip is None
        or is_same_chip(node.chip, node.gpu_cores, this_machine(node.device))
    }


if __name__ == "__main__":
    sys.exit(main())
