"""`macrame up`: starts every node of a config, here and over ssh, and follows them until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cluster.arguments import Parser
from cluster.config import ClusterConfig, NodeConfig, load_config
from cluster.console import say
from cluster.errors import EXIT_USAGE, UserError
from cluster.plan_choices import add_choices, choices_of, without_excluded
from cluster.probe import is_this_machine
from deploy.certificates import USUAL
from deploy.command import run_command
from deploy.up_board import Event
from deploy.up_display import display_for, early_display
from deploy.up_files import Hand, hand_out, make_certificates, needs_certificates, write_tls
from deploy.up_machines import Here, Machine
from deploy.up_record import Placed, alone, cluster_folder, cluster_name, read_record
from deploy.up_session import Session

INTERRUPTS = ("SIGINT", "SIGTERM", "SIGHUP")
EXAMPLES = (
    ("macrame up --config cluster.json", "all nodes are on this machine"),
    ("macrame up --config cluster.json --ssh", "and others, with your own ssh keys"),
    (
        "macrame up --config cluster.json --ssh --ssh-to mini2=alice@10.0.0.2",
        "where ssh must be given another name than the config's host",
    ),
    ("macrame up --config cluster.json --detach", "leave them running, and end"),
    ("macrame down --config cluster.json", "stop them again"),
)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after Ctrl-C or with --detach, 130 for Ctrl-C before the ring was ready; else as every
    command, where a node that ended by itself gives its own.
    """
    args = _parse(argv)
    return run_command("macrame up", lambda: _run(args), is_verbose=args.verbose)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="macrame up",
        description="Start every node of a config and follow them. Ctrl-C stops them all, everywhere. A "
        "second run keeps the nodes that run as the config wants them, and starts the others again. Nodes of "
        "this machine write to the folder that 'macrame down --help' names. docs/up.md tells all of it.",
        examples=EXAMPLES,
    )
    parser.add_argument("--config", type=Path, required=True, help="the cluster's JSON or YAML file")
    parser.add_argument("--model", help="a folder or a hub id, instead of the config's")
    add_choices(parser)
    parser.add_argument("--detach", action="store_true", help="end when the ring is ready; the nodes go on")
    parser.add_argument(
        "--wait-s",
        type=float,
        metavar="S",
        help="stop everything if the ring is not ready after S seconds (default: wait for ever)",
    )
    parser.add_argument(
        "--ssh",
        action="store_true",
        help="start the nodes of other machines over ssh; installs macrame in ~/.macrame there",
    )
    parser.add_argument(
        "--ssh-to",
        action="append",
        default=[],
        metavar="NODE=DESTINATION",
        help="what ssh takes for a node, instead of its host: user@host, or a Host of your ssh config",
    )
    parser.add_argument(
        "--ssh-config", type=Path, metavar="FILE", help="as ssh -F: instead of your ssh config"
    )
    parser.add_argument(
        "--find-links",
        type=Path,
        metavar="DIR",
        help="a folder of wheels to install from on the other machines, which then need no network",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.wait_s is not None and not 0 < args.wait_s <= 1e6:
        parser.error(f"--wait-s {args.wait_s} must be above 0")
    if args.find_links is not None and not args.find_links.is_dir():
        parser.error(f"--find-links {args.find_links} is no folder of this machine")
    return args


def _run(args: argparse.Namespace) -> int:
    for name in INTERRUPTS:
        signal.signal(getattr(signal, name), _interrupt)
    config = load_config(args.config, model=args.model)
    if config.api.port == 0:
        raise UserError(
            f"{args.config}: api.port is 0, any free port: give it a number, at which up can follow the ring",
            EXIT_USAGE,
        )
    without_excluded(config, args.exclude)
    destinations = _destinations(config, args)
    folder = cluster_folder(args.config)
    with alone(folder, args.config):
        early = early_display(is_json=args.json)
        for note in _certify(config):
            early.tell(note)  # now: it is done, whatever comes after
        hand = hand_out(args.config, args.model)
        _check_credentials(hand)
        options = () if args.ssh_config is None else ("-F", str(args.ssh_config.resolve()))
        machines: dict[str | None, Machine] = {}

        def machine_at(destination: str | None, earlier: Placed | None = None) -> Machine:
            """One for each destination; of an `earlier` run with the ssh options that it had."""
            if destination not in machines:
                had = options if earlier is None else read_record(folder).ssh_options
                machines[destination] = _machine(args, folder, destination, had, earlier)
            return machines[destination]

        nodes = [(machine_at(destinations[n.rank]), n) for n in config.nodes if n.use]
        for machine in list(machines.values()):
            if machine.destination is not None:
                say(f"Connecting to {machine.name} ...")
            machine.connect()
        session = Session(
            hand=hand,
            folder=folder,
            nodes=nodes,
            machine_at=machine_at,
            ssh_options=options,
            display=display_for(is_json=args.json),
            wait_s=args.wait_s,
            head_arguments=choices_of(args).as_arguments(),
        )
        return session.run(is_detached=args.detach)


def _destinations(config: ClusterConfig, args: argparse.Namespace) -> dict[int, str | None]:
    """Of each node that is used: what ssh takes, or None for this machine. Raises UserError."""
    given: dict[str, str] = {}
    names = [node.name for node in config.nodes]
    for text in args.ssh_to:
        name, equals, destination = text.partition("=")
        if not equals or not destination or destination.startswith("-"):
            raise UserError(
                f"--ssh-to {text} must be NODE=DESTINATION, as mini2=alice@mini2.local", EXIT_USAGE
            )
        if name not in names:
            raise UserError(f"--ssh-to {text}: {args.config} has only {', '.join(names)}", EXIT_USAGE)
        given[name] = destination
    found = {node.rank: given.get(node.name, _usual(node)) for node in config.nodes if node.use}
    away = [config.nodes[rank].name for rank, destination in found.items() if destination is not None]
    if away and not args.ssh:
        raise UserError(
            f"{', '.join(away)} of {args.config} {'is' if len(away) == 1 else 'are'} not on this machine: "
            "add --ssh to start what is on other machines too, or start it there with run_node",
            EXIT_USAGE,
        )
    return found


def _usual(node: NodeConfig) -> str | None:
    return None if is_this_machine(node.host) else node.host


def _machine(
    args: argparse.Namespace,
    folder: Path,
    destination: str | None,
    options: tuple[str, ...],
    placed: Placed | None,
) -> Machine:
    if destination is None:
        return Here(folder)
    from deploy.up_remote import There  # what a config of this machine alone has no use for

    return There(
        destination,
        cluster=cluster_name(args.config),
        wheels=folder / "wheels",
        options=options,
        find_links=args.find_links,
        placed=placed,
    )


def _certify(config: ClusterConfig) -> list[Event]:
    """Makes the certificates that the nodes lack, and says so. Raises ConfigError."""
    if not needs_certificates(config):
        return []
    made = make_certificates(config, datetime.now(UTC))
    notes = [
        Event("certificate", f"Made the certificate of {s.node.name}: {s.need}.", s.node.rank) for s in made
    ]
    if not config.security.has_tls:
        if write_tls(config):
            text = f"Wrote security.tls into {config.path}: from now on its nodes talk by certificates alone."
        else:
            tls = f'"tls": {{"ca": "{USUAL.tls_ca}", "cert": "{USUAL.tls_cert}", "key": "{USUAL.tls_key}"}}'
            text = (
                f"The nodes get certificates, which could not be written into {config.path}: "
                f'put {tls} into "security" there.'
            )
        notes.append(Event("config", text))
    return notes


def _check_credentials(hand: Hand) -> None:
    """As each node will. Raises ConfigError."""
    hand.as_handed.check_credentials()


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
