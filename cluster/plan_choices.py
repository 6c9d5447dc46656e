"""What one run plans otherwise than the cluster file says: --exclude, --keep-order, --force. Pure.

Only the head plans, so these are flags of the head and of plan-dry-run: the nodes need not agree on them, and
they are in no digest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.config import ClusterConfig
from cluster.config_read import ConfigError, nearest, show


@dataclass(frozen=True, slots=True)
class PlanChoices:
    """By default everything is as in the file."""

    excluded: tuple[str, ...] = ()  # names of nodes that are to own no layers
    keeps_order: bool = False  # stages in the order of the file
    is_forced: bool = False  # where nothing fits, plan what exceeds the budgets by the least

    def __bool__(self) -> bool:
        return self != PlanChoices()

    def as_arguments(self) -> tuple[str, ...]:
        """The flags that say this."""
        flags = {"--keep-order": self.keeps_order, "--force": self.is_forced}
        excluded = (f"--exclude={name}" for name in self.excluded)  # a name may begin with a dash
        return (*excluded, *(flag for flag, is_set in flags.items() if is_set))


AS_IN_FILE = PlanChoices()


def add_choices(parser: argparse.ArgumentParser) -> None:
    """The three flags."""
    parser.add_argument(
        "--exclude",
        action="extend",
        nargs="+",
        metavar="NODE",
        default=[],
        help="give these nodes no layers this time; the head stays the head without any",
    )
    parser.add_argument(
        "--keep-order", action="store_true", help="let the stages stand in the order of the file's nodes"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="where nothing fits, plan the split that exceeds the budgets by the least",
    )


def choices_of(args: argparse.Namespace) -> PlanChoices:
    """What the flags say."""
    return PlanChoices(tuple(args.exclude), args.keep_order, args.force)


def without_excluded(config: ClusterConfig, names: Sequence[str]) -> ClusterConfig:
    """The config with `"use": false` for these nodes. Raises ConfigError."""
    known = {node.name: node for node in config.nodes}
    for name in names:
        if name not in known:
            raise ConfigError(f"--exclude {name}: {not_a_node(name, list(known))}")
        layers = known[name].layers
        if layers is not None and known[name].use:
            raise ConfigError(
                f"--exclude {name}: the layers {layers[0]}:{layers[1]} are forced onto that node; "
                "force them onto another one, or onto none"
            )
    nodes = tuple(replace(node, use=node.use and node.name not in names) for node in config.nodes)
    if not any(node.use for node in nodes):
        raise ConfigError(f"--exclude {' '.join(names)}: no node is left to own layers; keep at least one")
    return replace(config, nodes=nodes)


def not_a_node(name: str, names: Sequence[str]) -> str:
    """The sentence about a name that no node has."""
    near = nearest(name, names)
    hint = f", the nearest is {show(near)}" if near else f": the nodes are {', '.join(names)}"
    return f"{show(name)} is no node{hint}"
