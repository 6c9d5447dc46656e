"""`macrame models`: which models are on this machine's disk, or on every node's; fetch one, remove one.

Main thread only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cluster.arguments import Parser
from cluster.errors import EXIT_OK, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from deploy.command import run_command
from deploy.models_list import as_json, here, of_ring, render
from deploy.models_pull import layers_of, pull
from deploy.models_use import user_of
from deploy.narrow import width_of
from planner.sizes import size


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 4 where `list` could not ask every node; 1 or 3 for what cannot be done."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.action == "list":
        if args.model is not None:
            parser.error("list takes no MODEL: it lists all")
        work = _list
    else:
        if args.model is None:
            parser.error(f"{args.action} needs a MODEL, such as mlx-community/Qwen3-1.7B-8bit")
        if args.config is not None:
            parser.error(f"--config is for list: {args.action} works on this machine, so run it on each")
        work = _pull if args.action == "pull" else _remove
    return run_command("macrame models", lambda: work(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame models",
        description="The models of the hub that are on disk, whole or in part, and in which place.\n\n"
        "  list    what is here, or with --config on every node of a running ring (the default)\n"
        "  pull    fetch a model now, all of it or some layers, into macrame's store\n"
        "  remove  remove a model from macrame's store\n\n"
        "No pull is needed: a node fetches what its layers need when it starts. A pull that was stopped goes "
        "on where it was. What is in the Hugging Face cache is used as it is and never removed: other "
        "programs use it too.",
        examples=(
            ("macrame models", "on this machine"),
            ("macrame models --config cluster.json", "on every node, and which layers each runs"),
            ("macrame models pull mlx-community/Qwen3-1.7B-8bit", "before the start, such as over night"),
            ("macrame models pull mlx-community/Qwen3-1.7B-8bit --layers 0:14", "this machine's half only"),
            ("macrame models remove mlx-community/Qwen3-1.7B-8bit --yes", "without being asked"),
        ),
    )
    parser.add_argument(
        "action", nargs="?", choices=("list", "pull", "remove"), default="list", help="as above"
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model of the hub")
    parser.add_argument("--config", type=Path, help="list: ask all nodes of this cluster file")
    parser.add_argument(
        "--layers", type=layers_of, metavar="A:B", help="pull: only what layers A to B (B not included) need"
    )
    parser.add_argument("--yes", action="store_true", help="remove: do not ask")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _list(args: argparse.Namespace) -> int:
    nodes = [here()] if args.config is None else of_ring(args.config)
    print(json.dumps(as_json(nodes), indent=2) if args.json else render(nodes, width_of(sys.stdout)))
    return EXIT_UNREACHABLE if any(node.trouble for node in nodes) else EXIT_OK


def _pull(args: argparse.Namespace) -> int:
    fetched = pull(args.model, args.layers)
    if args.json:
        told = {
            "model": args.model,
            "folder": str(fetched.folder),
            "revision": fetched.revision,
            "fetched_bytes": fetched.fetched_bytes,
            "wanted_bytes": fetched.wanted_bytes,
        }
        print(json.dumps(told, indent=2))
    else:
        came = f"{size(fetched.fetched_bytes)} came" if fetched.fetched_bytes else "it was there"
        print(f"{args.model} is in {fetched.folder}: {came}.")
    return EXIT_OK


def _remove(args: argparse.Namespace) -> int:
    from shard_loader.inventory import HUB_CACHE, OWN_STORE, inventory, remove_stored
    from shard_loader.sources import HubError

    kept = [one for one in inventory() if one.model == args.model]
    own = [one for one in kept if one.place == OWN_STORE]
    if not own:
        if any(one.place == HUB_CACHE for one in kept):
            raise UserError(
                f"{args.model} is in the Hugging Face cache, which other programs use too: remove it with "
                f"'hf cache rm model/{args.model}'",
                EXIT_USAGE,
            )
        raise UserError(f"{args.model} is not on this machine; 'macrame models' lists what is", EXIT_USAGE)
    pid = user_of(args.model)
    if pid is not None:
        raise UserError(
            f"a node here runs {args.model} (process {pid}): stop it first, such as with 'macrame down "
            "--config cluster.json'"
        )
    if not args.yes:
        _confirm(f"Remove {args.model} ({size(sum(one.here_bytes for one in own))})?")
    try:
        freed_bytes = remove_stored(args.model)
    except HubError as error:
        raise UserError(str(error)) from None
    if args.json:
        print(json.dumps({"model": args.model, "freed_bytes": freed_bytes}, indent=2))
    else:
        print(f"{args.model} is removed: {size(freed_bytes)} are free again.")
    return EXIT_OK


def _confirm(question: str) -> None:
    """Raises UserError unless the user says yes."""
    if not sys.stdin.isatty():
        raise UserError("nobody is there to ask: give --yes to remove it", EXIT_USAGE)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was removed")


if __name__ == "__main__":
    sys.exit(main())
