"""`macrame nodes`: who announces itself in the local network. Nothing of it is trusted. One thread."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from cluster.announce import Heard, listen
from cluster.arguments import Parser
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_UNREACHABLE, UserError
from deploy.command import run_command
from deploy.state_line import StateLine
from planner.render import table
from planner.sizes import size

DEFAULT_S = 3.0
MAX_S = 600.0
NO_ROUTE = (51, 65, 101, 113)  # macOS and Linux: the network, or the host, is out of reach


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if anything was heard, 4 if nothing was, 3 for what cannot be asked, else 1."""
    args = _parse(argv)
    return run_command("macrame nodes", lambda: _run(args), is_verbose=args.verbose)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="macrame nodes",
        description="List the nodes that announce themselves in the local network by Bonjour, with chip, "
        "memory and version. An announcement is a hint: anybody in the network can make one, and nodes prove "
        "who they are by their certificates.",
        examples=(
            ("macrame nodes", "who announces a node"),
            ("macrame nodes --ssh", "also machines that offer a login, as a Mac with Remote Login on does"),
            ("macrame nodes --seconds 10 --json", "listen longer, for a script"),
        ),
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=DEFAULT_S,
        metavar="S",
        help=f"listen for S seconds (default {DEFAULT_S:g})",
    )
    parser.add_argument("--ssh", action="store_true", help="list machines that offer ssh, too")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not 0 < args.seconds <= MAX_S:
        parser.error(f"--seconds {args.seconds:g} must be above 0 and at most {MAX_S:g}")
    return args


def _run(args: argparse.Namespace) -> int:
    line = StateLine(sys.stderr)
    line.show("macrame nodes: listening ...")
    try:
        heard = listen(args.seconds, with_ssh=args.ssh)
    except OSError as error:
        raise UserError(_why_deaf(error), EXIT_ERROR) from None
    line.end(f"macrame nodes: heard {len(heard)}.")
    if args.json:
        print(json.dumps([asdict(one) for one in heard], indent=2))
    elif heard:
        print("\n".join(render(heard)))
    else:
        print(_nobody(with_ssh=args.ssh))
    return EXIT_OK if heard else EXIT_UNREACHABLE


def render(heard: Sequence[Heard]) -> list[str]:
    """The lines of a table, and a word where nodes differ in their version."""
    lines = table([_row(one) for one in heard])
    versions = sorted({one.version for one in heard if one.version})
    if len(versions) > 1:
        lines += ["", f"They run different versions of macrame ({', '.join(versions)}): install one on all."]
    return lines


def _row(one: Heard) -> dict[str, str]:
    cores = f", {one.gpu_cores} GPU cores" if one.gpu_cores else ""
    return {
        "name": one.name,
        "what": f"rank {one.rank} of {one.cluster}" if one.rank is not None else one.kind,
        "host": one.host,
        "addresses": " ".join(one.addresses[:3]),
        "port": str(one.port),
        "chip": f"{one.chip}{cores}",
        "memory": size(one.memory_bytes) if one.memory_bytes else "",
        "version": one.version,
    }


def _nobody(*, with_ssh: bool) -> str:
    more = "" if with_ssh else " 'macrame nodes --ssh' also looks for machines that offer a login."
    return (
        "Nobody announces a node here. Nodes do while they run, unless their host is a loopback address or "
        'the config says "announce": false; a firewall, a guest Wi-Fi or, on macOS, the Local Network '
        f"permission of this terminal may keep them from being heard.{more}"
    )


def _why_deaf(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in NO_ROUTE:
        return (
            f"the local network cannot be heard ({reason}): on macOS allow this terminal under System "
            "Settings, Privacy & Security, Local Network; elsewhere look whether an interface is up"
        )
    return f"the local network cannot be heard: {reason}"


if __name__ == "__main__":
    sys.exit(main())
