"""`macrame profile`: measures what this machine does in a ms, and keeps it for every later plan.

The main thread owns MLX here. Progress goes to standard error, the table or the JSON object to standard
output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.arguments import Parser
from cluster.console import say
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from cluster.measured_speeds import MeasuredSpeeds
from cluster.probe import seen_machine
from cluster.profile_store import Machine, machine_of, read_speeds, write_speeds
from cluster.profile_timing import FULL, QUICK, Effort
from deploy.command import run_command
from deploy.profile_memory import add_memory
from deploy.profile_memory import run as run_memory
from deploy.profile_text import profile_text, speeds_text
from planner.node_profile import NodeProfile

if TYPE_CHECKING:
    from cluster.profile_machine import Measured


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 where nothing could be measured or kept."""
    args = _parser().parse_args(argv)
    return run_command("macrame profile", lambda: _run(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame profile",
        description="Measure this machine's speeds; later plans use them instead of the chip table. Run it "
        "once on each machine, while nothing else runs there.",
        examples=(
            ("macrame profile", "measure, and keep it for this machine"),
            ("macrame profile --show", "what was measured before"),
            ("macrame profile --memory --config cluster.json", "bytes of a ring's nodes"),
        ),
    )
    parser.add_argument("--quick", action="store_true", help="a third of the time, the main formats alone")
    parser.add_argument("--show", action="store_true", help="show what was measured before, measure nothing")
    parser.add_argument("--forget", action="store_true", help="remove what was measured before")
    parser.add_argument("--no-save", action="store_true", help="measure, but keep nothing")
    add_memory(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.memory:
        for name in ("quick", "show", "forget", "no_save"):
            if getattr(args, name):
                raise UserError(
                    f"--{name.replace('_', '-')} goes with speeds, not with --memory: give one of the two",
                    EXIT_USAGE,
                )
        return run_memory(args)
    for name in ("config", "tokens", "prompt_tokens", "out"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} goes with --memory: speeds are this machine's own", EXIT_USAGE
            )
    node = seen_machine()
    machine = machine_of(node.chip, node.gpu_cores, node.memory_bytes)
    if args.forget:
        _forget(machine)
        return EXIT_OK
    if args.show:
        return _show(node, machine, as_json=args.json)
    return measure(node, machine, QUICK if args.quick else FULL, is_kept=not args.no_save, as_json=args.json)


def _forget(machine: Machine) -> None:
    try:
        machine.path.unlink(missing_ok=True)
    except NotADirectoryError:  # so nothing was kept
        return
    except OSError as error:
        raise UserError(
            f"the speeds in {machine.path} cannot be removed: {error.strerror or error}; remove it by hand",
            EXIT_ERROR,
        ) from error


def _show(node: NodeProfile, machine: Machine, *, as_json: bool) -> int:
    found = read_speeds(machine)
    if found is None:
        raise UserError("no speeds were measured here with this MLX: run macrame profile", EXIT_ERROR)
    print(json.dumps(_object(node, machine, found), indent=2) if as_json else speeds_text(node, found))
    return EXIT_OK


def measure(node: NodeProfile, machine: Machine, effort: Effort, *, is_kept: bool, as_json: bool) -> int:
    """Measure, print and keep. Raises UserError."""
    from cluster.profile_machine import measure_machine  # MLX is imported from here on

    started = time.monotonic()

    def progress(line: str) -> None:
        say(f"macrame profile: {time.monotonic() - started:4.1f} s  {line}")

    try:
        measured = measure_machine(
            effort,
            available_bytes=node.available_bytes or node.memory_bytes,
            disk_folder=machine.path.parent,
            say=progress,
        )
        found = MeasuredSpeeds(measured.speeds, date.today().isoformat())
    except ValueError as error:
        raise UserError(f"this machine could not be measured: {error}", EXIT_ERROR) from error
    took_s = time.monotonic() - started
    path = _keep(machine, found, measured) if is_kept else None
    if as_json:
        details = {"took_s": round(took_s, 2), "file": str(path) if path else None, "raw": asdict(measured)}
        print(json.dumps(_object(node, machine, found) | details, indent=2))
    else:
        print(profile_text(node, found, measured, took_s, path))
    return EXIT_OK


def _keep(machine: Machine, found: MeasuredSpeeds, measured: Measured) -> Path:
    try:
        return write_speeds(machine, found, asdict(measured))
    except OSError as error:
        raise UserError(
            f"the speeds cannot be kept in {machine.path.parent}: {error.strerror or error}; set "
            "XDG_CACHE_HOME to a folder that can be written",
            EXIT_ERROR,
        ) from error


def _object(node: NodeProfile, machine: Machine, found: MeasuredSpeeds) -> dict[str, Any]:
    return {"machine": asdict(machine), "device": node.device, "speeds": found.as_dict()}


if __name__ == "__main__":
    sys.exit(main())
