"""The arguments of `plan-dry-run`, and the configuration that they make of the file's. Pure."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.arguments import Parser
from cluster.config import MAX_CONCURRENCY, MAX_CONTEXT, OBJECTIVES, STRATEGIES, ClusterConfig
from cluster.config_nodes import parse_layers
from cluster.config_read import ConfigError, show
from cluster.plan_choices import add_choices, not_a_node, without_excluded
from cluster.plan_plot import plot_path
from cluster.sweep import check_sweep, sweep_range
from planner.sweep import EXAMPLES


def plan_parser() -> Parser:
    """All arguments."""
    parser = Parser(
        prog="plan-dry-run",
        description="Which node would own which layers, how fast that would be, and why. Reads the cluster "
        "file and the model's headers; loads no weights and connects to no node. 'macrame plan' is the same, "
        "and 'macrame plan --from-running' says what another plan would gain a ring that runs.",
        examples=(
            ("macrame plan --config cluster.json", "the plan that the ring would start with"),
            ("macrame plan --config cluster.json --context 32768", "does a longer context still fit?"),
            (
                "macrame plan --config cluster.json --layers mini=0:4 --why",
                "the first four layers on the node mini, and what binds the rest",
            ),
            ("macrame plan --from-running", "would the ring at http://127.0.0.1:8080 gain by another plan?"),
        ),
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the cluster's JSON or YAML file, or a hostfile"
    )
    parser.add_argument("--model", help="a folder or a hub id, instead of the config's")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="how to split the layers (default: the config's, or optimal)"
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what the optimal strategy makes best (default: the config's, or latency)",
    )
    parser.add_argument(
        "--context",
        type=_up_to(MAX_CONTEXT),
        metavar="N",
        help="tokens of one request, prompt and answer (default: the config's)",
    )
    parser.add_argument(
        "--concurrency",
        type=_up_to(MAX_CONCURRENCY),
        metavar="N",
        help="requests at once (default: the config's)",
    )
    parser.add_argument(
        "--layers",
        action="extend",
        nargs="+",
        metavar="NODE=A:B",
        help="force layers A to B (B not included) onto a node; replaces all forced layers of the config",
    )
    add_choices(parser)
    parser.add_argument(
        "--sweep",
        type=sweep_range,
        metavar="AXIS=A..B",
        help=f"what if: a plan for each value, doubling; such as {EXAMPLES}",
    )
    parser.add_argument("--plot", type=plot_path, metavar="FILE.svg", help="also draw it, as .svg or .png")
    parser.add_argument(
        "--why", action="store_true", help="say all that binds the plan and would change it, also in the JSON"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--compare",
        action="store_true",
        help='every strategy beside the plan, however long that takes; "strategies" in JSON',
    )
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _up_to(most: int) -> Callable[[str], int]:
    """Reads a whole number above 0, within the limit that the file has for it."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = 0
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} must be at most {most}")
        return value

    return read


def with_arguments(config: ClusterConfig, args: argparse.Namespace) -> ClusterConfig:
    """The config as the command line changes it. Raises ConfigError."""
    check_sweep(args)
    config = config.with_overrides(
        context=args.context, concurrency=args.concurrency, strategy=args.strategy, objective=args.objective
    )
    return without_excluded(_with_layers(config, args.layers), args.exclude)


def _with_layers(config: ClusterConfig, texts: Sequence[str] | None) -> ClusterConfig:
    """The config with the layers that the command line forces, and none but those."""
    if not texts:
        return config
    forced: dict[str, tuple[int, int]] = {}
    names = [node.name for node in config.nodes]
    for text in texts:
        name, sign, layers = text.rpartition("=")
        if not sign:
            raise ConfigError(f"--layers {text}: write NODE=A:B, such as {names[0]}=0:10")
        if name not in names:
            raise ConfigError(f"--layers {text}: {not_a_node(name, names)}")
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
