"""`plan-dry-run --sweep`: the config with one value changed, over and over. Pure but for what plans."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

from cluster.config import MAX_CONCURRENCY, ClusterConfig
from cluster.config_read import ConfigError
from planner.sweep import SweepError, SweepRange, parse_range


def sweep_range(text: str) -> SweepRange:
    """The argument of --sweep; argparse makes exit code 3 of its ArgumentTypeError."""
    try:
        return parse_range(text)
    except SweepError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_sweep(args: argparse.Namespace) -> None:
    """Raises ConfigError where the command line also gives the value that --sweep changes."""
    axis = None if args.sweep is None else args.sweep.axis
    if axis in ("context", "concurrency") and getattr(args, axis) is not None:
        raise ConfigError(f"--sweep {axis} and --{axis} exclude each other: leave one away")
    for flag in ("why", "compare"):
        if axis is not None and getattr(args, flag):
            raise ConfigError(f"--sweep and --{flag} exclude each other: ask for one value with --{flag}")
    if axis is not None and args.force:
        raise ConfigError("--sweep and --force exclude each other: a sweep shows where the limit lies")


def swept(config: ClusterConfig, swept_by: SweepRange) -> Iterator[ClusterConfig]:
    """The config for each value. Raises ConfigError for a node that is not there, or a value out of range."""
    if swept_by.axis == "concurrency" and swept_by.values[-1] > MAX_CONCURRENCY:
        raise ConfigError(f"--sweep: {swept_by.values[-1]} requests are more than {MAX_CONCURRENCY}")
    names = [node.name for node in config.nodes]
    if swept_by.node is not None and swept_by.node not in names:
        raise ConfigError(f"--sweep memory:{swept_by.node}: the nodes are {', '.join(names)}")
    change: Callable[[int], ClusterConfig] = {
        "context": lambda value: replace(config, context=value),
        "concurrency": lambda value: replace(config, concurrency=value),
        "memory": lambda value: _with_memory(config, swept_by.node, value),
    }[swept_by.axis]
    return map(change, swept_by.values)


def _with_memory(config: ClusterConfig, name: str | None, memory_gb: int) -> ClusterConfig:
    nodes = (
        replace(node, memory_gb=float(memory_gb)) if node.name == name else node for node in config.nodes
    )
    return replace(config, nodes=tuple(nodes))
