"""`macrame down`: stops the nodes that `macrame up` started, wherever they are."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.arguments import Parser
from cluster.console import say
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_UNREACHABLE, UserError
from deploy.command import run_command
from deploy.up_machines import HERE, Here, Machine
from deploy.up_record import (
    Placed,
    Record,
    alone,
    cluster_folder,
    cluster_name,
    read_record,
    running_up,
    write_record,
)

UP_LIMIT_S = 30.0  # for an `up` in another terminal to stop its nodes
LOCK_S = 2.0  # and then for it to be gone
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """One node: what did not end by itself, or why its machine could not be asked."""

    node: Placed
    was_running: bool = False
    left: str = ""
    is_unreachable: bool = False


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if nothing runs any more, 4 where a machine is away, 1 where a node had to be killed."""
    parser = Parser(
        prog="macrame down",
        description="Stop the nodes that 'macrame up' started of a config, wherever they are.",
        epilog="It goes by what 'up' recorded, not by what the config says now. Records and logs of this "
        "machine's nodes are in macrame/clusters/ below ~/Library/Application Support (macOS), "
        "~/.local/share, or XDG_DATA_HOME.",
        examples=(
            ("macrame down --config cluster.json", "stop what 'macrame up --config cluster.json' started"),
        ),
    )
    parser.add_argument("--config", type=Path, required=True, help="the file that macrame up was given")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame down", lambda: _run(args), is_verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    folder = cluster_folder(args.config)
    began, before = time.monotonic(), read_record(folder)
    is_followed = _end_up(folder)
    ended = []
    if folder.is_dir():
        # A full disk is a reason to stop them, and an up that was told to stop may still hold the lock.
        with alone(folder, args.config, is_named=False, patience_s=LOCK_S):
            record = read_record(folder)
            ended = _stop_all(record, folder, args.config)
            rest = tuple(e.node for e in ended if e.is_unreachable)
            write_record(folder, Record(rest, record.ssh_options))
    if is_followed and not ended:  # that `up` has stopped them
        ended = [Ended(node, was_running=True) for node in before.nodes]
    _show(args, ended, time.monotonic() - began)
    if any(e.is_unreachable for e in ended):
        return EXIT_UNREACHABLE
    return EXIT_ERROR if any(e.left for e in ended) else EXIT_OK


def _end_up(folder: Path) -> bool:
    """Lets an `up` that follows the nodes end, which stops them; whether there was one."""
    pid = running_up(folder)
    if pid is None:
        return False
    say(f"macrame up runs as process {pid}: telling it to stop ...")
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise UserError(f"process {pid} is another user's: stop it there", EXIT_ERROR) from None
    deadline = time.monotonic() + UP_LIMIT_S
    while running_up(folder) is not None:
        if time.monotonic() > deadline:
            raise UserError(
                f"macrame up (process {pid}) did not end within {UP_LIMIT_S:.0f} s: kill -9 {pid}, then run "
                "macrame down again",
                EXIT_ERROR,
            )
        time.sleep(POLL_S)
    return True


def _stop_all(record: Record, folder: Path, config: Path) -> list[Ended]:
    machines: dict[str | None, Machine | UserError] = {}
    for placed in record.nodes:
        if placed.destination not in machines:
            machines[placed.destination] = _connected(placed, record, folder, config)
    try:
        return [_stop(placed, machines[placed.destination]) for placed in record.nodes]
    finally:
        for machine in machines.values():
            if not isinstance(machine, UserError):
                machine.close()


def _connected(placed: Placed, record: Record, folder: Path, config: Path) -> Machine | UserError:
    if placed.destination is None:
        return Here(folder)
    from deploy.up_remote import There

    machine = There(
        placed.destination,
        cluster=cluster_name(config),
        wheels=folder / "wheels",
        options=record.ssh_options,
        find_links=None,
        placed=placed,
    )
    try:
        machine.connect()
    except UserError as error:
        return error
    return machine


def _stop(placed: Placed, machine: Machine | UserError) -> Ended:
    if isinstance(machine, UserError):
        return Ended(placed, left=str(machine), is_unreachable=True)
    try:
        handle = machine.handle(placed.rank)
        if not handle.state().is_running:
            return Ended(placed)
        return Ended(placed, was_running=True, left=handle.stop())
    except UserError as error:
        return Ended(placed, left=str(error), is_unreachable=error.exit_code == EXIT_UNREACHABLE)


def _show(args: argparse.Namespace, ended: list[Ended], seconds: float) -> None:
    if args.json:
        print(json.dumps({"nodes": [_plain(e) for e in ended], "seconds": round(seconds, 3)}, indent=2))
        return
    for e in ended:
        where = e.node.destination or HERE
        if e.left:
            print(f"{e.node.name} on {where}: {e.left}")
        elif e.was_running:
            print(f"{e.node.name} on {where} stopped.")
        else:
            print(f"{e.node.name} on {where} did not run.")
    if not ended:
        print(f"No node of {args.config} runs that macrame up started.")


def _plain(ended: Ended) -> dict[str, object]:
    return {
        "rank": ended.node.rank,
        "name": ended.node.name,
        "where": ended.node.destination or HERE,
        "was_running": ended.was_running,
        "is_unreachable": ended.is_unreachable,
        "left": ended.left,
    }


if __name__ == "__main__":
    sys.exit(main())
