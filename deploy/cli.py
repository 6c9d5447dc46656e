"""`macrame COMMAND ...`: one name for all commands. Imports a command's module only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys

from cluster.arguments import Parser
from cluster.errors import EXIT_OK
from deploy.command import INTERRUPTED, run_command

# command: (module with main(argv) -> exit code, one line of help)
COMMANDS = {
    "demo": ("deploy.demo.run", "three nodes on this machine, one streamed answer, then stop"),
    "init": ("deploy.init", "write a cluster file, by asking or from the names of hosts"),
    "up": ("deploy.up", "start every node of a config, here and over ssh, and follow them"),
    "down": ("deploy.down", "stop the nodes that macrame up started"),
    "plan": ("deploy.plan", "which node would own which layers (plan-dry-run)"),
    "cuts": ("deploy.cuts", "before which layers a model may be cut, proven"),
    "node": ("cluster.run_node", "run one node of the ring (run_node)"),
    "fit": ("deploy.fit", "what of a model fits machines of given memory"),
    "profile": ("deploy.profile", "measure this machine's speeds, for better plans"),
    "trace": ("deploy.trace", "where the milliseconds of a token go, as a timeline of the whole ring"),
    "kernels": ("deploy.kernels", "are the kernels for experts and EXL3 right here, and how fast"),
    "bench": ("deploy.bench", "tokens per second, hops and CPU time of a ring"),
    "links": ("deploy.links", "round trip and bandwidth between the nodes of a running ring"),
    "nodes": ("deploy.nodes", "who announces itself in the local network"),
    "status": ("deploy.status", "what the nodes of a running ring do"),
    "serve": ("deploy.serve", "serve a model on this machine, in the foreground"),
    "ps": ("deploy.ps", "the requests that a running ring works on"),
    "doctor": ("deploy.doctor", "what is wrong with this machine or a ring, and what mends it"),
    "service": ("deploy.service", "a node that the system starts and keeps running: install, remove, status"),
    "certs": ("deploy.certs", "the certificates by which nodes know each other: make, show, renew"),
    "chat": ("deploy.chat", "talk to a running ring"),
    "generate": ("deploy.generate", "one streamed answer of a running ring"),
    "models": ("deploy.models", "which models are on which disk; fetch one, remove one"),
    "quantize": ("deploy.quantize", "a model folder with fewer bits a weight: EXL3 or affine"),
    "completion": ("deploy.completion", "a script that lets your shell complete these commands"),
}


def _parser() -> Parser:
    lines = "\n".join(f"  {name:12}{text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="macrame",
        description="Many Macs, one model.",
        epilog=f"commands:\n{lines}\n\n'macrame COMMAND --help' explains one, with examples.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own")
    return parser


def _print_version() -> int:
    from cluster.versions import macrame_version

    print(f"macrame {macrame_version()}")
    return EXIT_OK


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        return run_command("macrame", _print_version, is_verbose=False)
    if args.command is None:
        parser.error("which command?")
    try:
        module = importlib.import_module(COMMANDS[args.command][0])
        return int(module.main(args.arguments))
    except KeyboardInterrupt:  # Ctrl-C while it was imported, or before its own border stood
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
