"""`macrame service install|remove|status`: a node that the system starts and keeps running. Main thread."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import macos
from cluster.arguments import Parser
from cluster.console import say
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from deploy import service_launchd, service_systemd
from deploy.command import run_command
from deploy.service_apply import Target, install, installed, remove, state
from deploy.service_node import check_start, fleeting_path, node_service, privacy_warning, read_environment
from deploy.service_text import as_json, as_text, commands, row, row_json
from deploy.units import WIRED_LIMIT, Found, Installation, Manager, State
from planner.render import table

MANAGERS: dict[str, Manager] = {"launchd": service_launchd, "systemd": service_systemd}
OF_PLATFORM = {"darwin": "launchd", "linux": "systemd"}
MIB = 1 << 20
LEFT_SHARE, LEFT_BYTES = 0.1, 2 * 10**9  # what a wired limit leaves to the rest of a Mac, at least
_EXAMPLES = (
    (
        "macrame service install --config cluster.json --print",
        "what would be written and run, and nothing else",
    ),
    (
        "sudo macrame service install --config cluster.json",
        "the node whose host is this machine, as your user",
    ),
    (
        "sudo macrame service install --rank 1 --config cluster.json --env HF_HOME=/data/hf -- --verbose",
        "rank 1; what follows -- goes to run_node",
    ),
    ("macrame service status --json", "what is installed, and whether it runs"),
    ("sudo macrame service remove node1", "stop it, and take its files away; its logs stay"),
    ("sudo macrame service install wired-limit --mb 12288", "only on a Mac, and only if you know why"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where `status` finds a service that does not run, or root is needed; 3 for usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:cut])
    args.node_arguments, args.words = words[cut + 1 :], words
    actions = {"install": _install, "remove": _remove, "status": _status}
    return run_command(
        f"macrame service {args.action}", lambda: actions[args.action](args), is_verbose=args.verbose
    )


def _parser() -> Parser:
    parser = Parser(
        prog="macrame service",
        description="Keeps a node of the ring running: after a crash, after a restart of the machine, and "
        "without anybody logged in. On macOS it is a LaunchDaemon that runs as your user, on Linux a unit of "
        "systemd.",
        examples=_EXAMPLES,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="install|remove|status")
    add = actions.add_parser(
        "install",
        help="write the service's files and start it",
        description="Writes the service's files and starts it; once more does no harm. What follows -- goes "
        "to run_node.",
        examples=_EXAMPLES[:3],
    )
    add.add_argument(
        "what", nargs="?", choices=("node", WIRED_LIMIT), default="node", help="node, if not given"
    )
    add.add_argument("--config", type=Path, help="the cluster's JSON or YAML file")
    add.add_argument("--rank", type=int, help="which node (default: the one whose host is this machine)")
    add.add_argument("--name", help="the service's name (default: node and the rank, as in node0)")
    add.add_argument("--user", help="whom the node runs as (default: who calls sudo)")
    add.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="for the node's environment"
    )
    add.add_argument("--mb", type=int, help="the wired limit in MiB")
    add.add_argument("--no-start", action="store_true", help="write the files, and start nothing")
    add.add_argument(
        "--print", action="store_true", dest="is_dry", help="print files and commands, do nothing"
    )
    add.add_argument(
        "--system", choices=tuple(MANAGERS), help="for --print and --root: another system's files"
    )
    gone = actions.add_parser(
        "remove",
        help="stop a service",
        description="Stops a service and takes its files away; its logs stay.",
    )
    gone.add_argument("name", nargs="?", help="which (default: the one that is installed)")
    show = actions.add_parser(
        "status",
        help="what is installed",
        description="What is installed, and whether it runs; exit code 1 if something does not.",
    )
    show.add_argument("name", nargs="?", help="only this one")
    for action in (add, gone, show):
        action.add_argument(
            "--root", type=Path, metavar="DIR", help="files below this folder; nothing is run"
        )
        action.add_argument("--json", action="store_true", help="print JSON")
        action.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _install(args: argparse.Namespace) -> int:
    manager, target = _manager(args), Target(args.root)
    plan = _wired_limit(args) if args.what == WIRED_LIMIT else _node(args, manager, target)
    if args.is_dry:
        print(json.dumps(as_json(plan), indent=2) if args.json else "\n".join(as_text(plan)))
        return EXIT_OK
    _need_system(manager, target)
    _need_root(args, target)
    files = install(plan, target, is_started=not args.no_start)
    is_started = target.root is None and not args.no_start
    if args.json:
        print(json.dumps({"files": list(map(str, files)), "started": is_started}, indent=2))
        return EXIT_OK
    print(
        "\n".join(
            [*(f"Wrote {path}" for path in files), *(["Started it."] if is_started else []), *plan.notes]
        )
    )
    if not is_started:
        print("\n".join(["Not started. On its machine:", *commands(plan)]))
    return EXIT_OK


def _node(args: argparse.Namespace, manager: Manager, target: Target) -> Installation:
    if args.config is None:
        raise UserError("which cluster? give --config its file", EXIT_USAGE)
    if args.mb is not None:
        raise UserError(f"--mb is for 'macrame service install {WIRED_LIMIT}'", EXIT_USAGE)
    service = node_service(
        args.config,
        rank=args.rank,
        name=args.name,
        user=args.user,
        environment=read_environment(args.env),
        arguments=args.node_arguments,
        is_confined=manager is MANAGERS["systemd"],
    )
    for other in installed(manager, target):
        if other.name == service.name and other.config != str(service.config):
            raise UserError(
                f"{service.name} is the service of {other.config} already: remove it, or give this one "
                "another --name",
                EXIT_USAGE,
            )
    check_start(service)
    is_systemd = manager is MANAGERS["systemd"]
    warning = fleeting_path(service) if is_systemd else privacy_warning(service)
    if warning is not None and is_systemd and not args.is_dry and target.root is None:
        raise UserError(warning, EXIT_USAGE)
    if warning is not None:
        say(f"macrame service install: warning: {warning}")
    return manager.node_installation(service)


def _wired_limit(args: argparse.Namespace) -> Installation:
    """Raises UserError for another system, and for a limit that leaves a Mac too little."""
    if args.mb is None or args.mb < 1:
        raise UserError(
            f"{WIRED_LIMIT} takes --mb, the GPU's limit in MiB; 'plan-dry-run' names the least that helps",
            EXIT_USAGE,
        )
    if _manager(args) is not MANAGERS["launchd"]:
        raise UserError("a wired limit is something of macOS; no other system has one", EXIT_USAGE)
    memory = macos.sysctl("hw.memsize") if sys.platform == "darwin" else None
    if memory is not None and memory.isdecimal():
        most_mb = (int(memory) - max(LEFT_BYTES, int(int(memory) * LEFT_SHARE))) // MIB
        if args.mb > most_mb:
            raise UserError(
                f"--mb {args.mb} leaves the rest of this Mac too little: at most {most_mb}", EXIT_USAGE
            )
    return service_launchd.wired_limit_installation(args.mb)


def _remove(args: argparse.Namespace) -> int:
    manager, target = _manager(args), Target(args.root)
    name = _named(args.name, installed(manager, target)).name
    _need_root(args, target)
    files = remove(manager.removal(name), target)
    if args.json:
        print(json.dumps({"name": name, "files": list(map(str, files))}, indent=2))
    else:
        print("\n".join([f"Removed {path}" for path in files]))
    return EXIT_OK


def _status(args: argparse.Namespace) -> int:
    manager, target = _manager(args), Target(args.root)
    found = installed(manager, target)
    if args.name is not None:
        found = [_named(args.name, found)]
    is_asked = target.root is None
    states = [state(manager, one.name) if is_asked else State("not asked", is_well=True) for one in found]
    if args.json:
        print(
            json.dumps({"services": [row_json(*pair) for pair in zip(found, states, strict=True)]}, indent=2)
        )
    elif not found:
        print("No node is installed as a service here; 'macrame service install --help' says how.")
    else:
        print("\n".join(table([row(*pair) for pair in zip(found, states, strict=True)])))
    return EXIT_OK if all(one.is_well for one in states) else EXIT_ERROR


def _manager(args: argparse.Namespace) -> Manager:
    """Of this machine, or the one asked for where nothing is run. Raises UserError."""
    own, asked = OF_PLATFORM.get(sys.platform), getattr(args, "system", None)
    if asked is not None and asked != own and not (args.is_dry or args.root):
        raise UserError(f"--system {asked} is not this machine's: add --print or --root DIR", EXIT_USAGE)
    if (asked or own) is None:
        raise UserError(
            f"services are written for launchd and systemd, and this is {sys.platform}: --system with "
            "--print or --root writes the files of another machine",
            EXIT_USAGE,
        )
    return MANAGERS[asked or own or ""]


def _need_system(manager: Manager, target: Target) -> None:
    reason = manager.why_not_here() if target.root is None else None
    if reason is not None:
        raise UserError(f"{reason}: --print shows what would be done, --root DIR writes the files there")


def _need_root(args: argparse.Namespace, target: Target) -> None:
    """Raises UserError with the line to be run instead."""
    if target.root is not None or os.geteuid() == 0:
        return
    own = Path(sys.executable).with_name("macrame")
    program = [str(own)] if own.exists() else [sys.executable, "-m", "deploy.cli"]
    line = shlex.join(["sudo", *program, "service", *args.words])
    raise UserError(f"services belong to the system, which only root may change: run {line}")


def _named(name: str | None, found: Sequence[Found]) -> Found:
    if name is None and len(found) == 1:
        return found[0]
    for one in found:
        if one.name == name:
            return one
    if not found:
        raise UserError("no service of macrame is installed here", EXIT_USAGE)
    asked = "which service?" if name is None else f"there is no service {name!r} here;"
    raise UserError(f"{asked} installed are {', '.join(one.name for one in found)}", EXIT_USAGE)


if __name__ == "__main__":
    sys.exit(main())
