"""`macrame init`: writes a cluster file, by asking or from the names of hosts. Main thread only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.arguments import Parser
from cluster.console import say
from cluster.errors import EXIT_OK, EXIT_USAGE, UserError
from deploy.command import run_command
from deploy.init_ask import DEFAULT_MODEL, Asker, ask_hosts
from deploy.init_file import as_text, check, document, model_of, next_commands, placed, refuse_existing, write
from deploy.init_probe import Machine, is_here, probe, this_machine
from deploy.local_ring import is_free
from planner.render import table
from planner.sizes import size

API_PORTS = range(8080, 8100)
_EXAMPLES = (
    ("macrame init", "asks which machines and which model"),
    (
        "macrame init --host localhost alice@mini2.local --model mlx-community/Qwen3-1.7B-8bit",
        "asks nothing: this machine and another, as ssh knows it",
    ),
    ("macrame init --host mini1 mini2 --model org/name -o two.yaml", "two others, in YAML"),
)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 3 where a file is there or an answer is missing, 4 for a machine that ssh cannot reach."""
    args = _parse(argv)
    return run_command("macrame init", lambda: _run(args), is_verbose=args.verbose)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="macrame init",
        description="Write the file that describes a cluster: its machines, with chip and memory, and its "
        "model. Other machines are looked at over ssh, with your own keys; nothing is installed or changed "
        "there. On a terminal it asks for what is not given.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--host",
        nargs="+",
        action="extend",
        default=[],
        metavar="HOST",
        help="as ssh takes it: host, user@host, or a Host of your ssh config; localhost for this machine",
    )
    parser.add_argument("--model", help="a hub id, or a folder (default: it asks)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("cluster.json"),
        metavar="FILE",
        help="where to write it (default cluster.json)",
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument(
        "--ssh-config", type=Path, metavar="FILE", help="as ssh -F: instead of your ssh config"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    refuse_existing(args.output, is_forced=args.force)
    asker = Asker(sys.stdin, sys.stderr) if sys.stdin.isatty() else None
    if asker is None and not (args.host and args.model):
        missing = "--model" if args.host else "--host"
        raise UserError(f"standard input is no terminal to ask at: give {missing}", EXIT_USAGE)
    model = model_of(args.model) if args.model else None
    own = this_machine()
    hosts = list(dict.fromkeys(args.host)) or ask_hosts(_there(asker), own)
    machines = placed(_machines(hosts, own, args.ssh_config, asker))
    if model is None:
        model = _there(asker).until("Which model? A Hugging Face id, or a folder:", DEFAULT_MODEL, model_of)
    text = as_text(args.output, document(model, machines, _api_port(machines)))
    _say_oddities(machines)
    if not args.host:
        print("\n".join(_shown(machines)), file=sys.stderr)
        if _there(asker).choose(f"Write {args.output}?", ("yes", "no")) == "no":
            raise UserError("nothing was written", EXIT_USAGE)
    check(args.output, text)
    write(args.output, text)
    commands = next_commands(args.output, machines, args.ssh_config)
    if args.json:
        told = {"file": str(args.output), "machines": [asdict(one) for one in machines], "next": commands}
        print(json.dumps(told, indent=2))
        return EXIT_OK
    if args.host:
        print("\n".join([*_shown(machines), ""]))
    print(f"Wrote {args.output}. Now see the plan, and start it:\n    {commands[0]}\n    {commands[1]}")
    if any(one.destination is not None for one in machines):
        print("'macrame up' makes certificates for the nodes when it starts them the first time.")
    return EXIT_OK


def _there(asker: Asker | None) -> Asker:
    assert asker is not None  # without one nothing is left to ask
    return asker


def _machines(
    hosts: Sequence[str], own: Machine, ssh_config: Path | None, asker: Asker | None
) -> list[Machine]:
    """Each host looked at. Raises UserError for those that cannot be reached, all in one sentence."""
    options = () if ssh_config is None else ("-F", str(ssh_config))
    found, failed = [], []
    for host in hosts:
        if is_here(host):
            found.append(own)
            continue
        while True:
            say(f"Looking at {host} ...")
            try:
                found.append(probe(host, options, is_interactive=asker is not None))
                break
            except UserError as error:
                if asker is None:
                    failed.append(error)
                    break
                say(str(error))
                answer = asker.choose(f"{host}: try again, leave it out, or stop?", ("try", "leave", "stop"))
                if answer == "stop":
                    raise
                if answer == "leave":
                    break
    if failed:
        raise UserError("; ".join(map(str, failed)), failed[0].exit_code)
    if not found:
        raise UserError("no machine is left, and nothing was written", EXIT_USAGE)
    return found


def _api_port(machines: Sequence[Machine]) -> int:
    """8080, or the next one that is free, where this machine is the head and can look."""
    if machines[0].destination is not None or is_free("127.0.0.1", API_PORTS[0]):
        return API_PORTS[0]
    port = next((port for port in API_PORTS if is_free("127.0.0.1", port)), API_PORTS[0])
    say(f"Port {API_PORTS[0]} is taken on this machine: the HTTP API gets {port}.")
    return port


def _say_oddities(machines: Sequence[Machine]) -> None:
    """What is allowed and seldom meant."""
    first: dict[str, str] = {}
    for one in machines:
        if one.identity:
            other = first.setdefault(one.identity, one.name)
            if other != one.name:
                say(f"warning: {one.name} and {other} look like one machine, whose memory would count twice")
        if not one.can_install:
            say(
                f"warning: {one.name} has neither Python 3.11 or newer nor uv: macrame up --ssh needs one of "
                "them there"
            )
    if all(one.destination is not None for one in machines):
        say("This machine is none of the nodes; --host localhost makes it one.")


def _shown(machines: Sequence[Machine]) -> list[str]:
    return table(
        [
            {
                "rank": str(rank),
                "node": one.name,
                "host": one.host,
                "system": one.system,
                "chip": one.chip + (f", {one.gpu_cores} GPU cores" if one.gpu_cores else ""),
                "memory": size(one.memory_bytes),
            }
            for rank, one in enumerate(machines)
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
