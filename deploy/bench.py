"""`macrame bench`: what a ring does for 1..N users; a config's ring, started here, or one that runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.bench import Endpoint, measure, table
from cluster.config import load_config
from cluster.errors import EXIT_OK, EXIT_USAGE, UserError
from deploy.bring_up import running
from deploy.client import Client
from deploy.command import run_command
from deploy.target import DEFAULT_URL, client_of


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or one JSON object; returns the exit code."""
    parser = Parser(
        prog="macrame bench",
        description="Tokens per second for one user and for several at once, with hops, stage times and CPU "
        "time: of a ring that runs, or of a config's ring that is started on this machine for it.",
        examples=(
            ("macrame bench --url http://127.0.0.1:8080", "a ring that runs"),
            ("macrame bench --config cluster.json --concurrency 1,4,8 --json", "started here; JSON to keep"),
        ),
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config", type=Path, help="a cluster file whose ring is started here for the bench")
    group.add_argument("--url", help=f"a ring that runs, such as {DEFAULT_URL}")
    parser.add_argument(
        "--concurrency",
        type=_counts,
        default=[1, 2, 4],
        metavar="N,...",
        help="users at once (default 1,2,4)",
    )
    parser.add_argument(
        "--prompt-tokens", type=_count, default=128, metavar="N", help="of each prompt (default 128)"
    )
    parser.add_argument(
        "--max-tokens", type=_count, default=128, metavar="N", help="of each answer; default 128"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame bench", lambda: _bench(args), is_verbose=args.verbose)


def _bench(args: argparse.Namespace) -> int:
    if args.url is not None:
        result = _measure(args, client_of(argparse.Namespace(config=None, url=args.url)), None)
    else:
        context = load_config(args.config).context
        if context is not None and args.prompt_tokens + args.max_tokens > context:
            raise UserError(
                f"{args.config}: a prompt of {args.prompt_tokens} and an answer of {args.max_tokens} tokens "
                f"exceed context = {context}: ask for less",
                EXIT_USAGE,
            )
        with running(args.config, sys.stderr) as ring:
            result = _measure(args, ring.client, ring.processes.cpu_s)
    print(json.dumps(result, indent=2) if args.json else table(result))
    return EXIT_OK


def _measure(args: argparse.Namespace, client: Client, cpu_s: Callable[[], float] | None) -> dict[str, Any]:
    return measure(
        Endpoint(client.url, client.key),
        args.concurrency,
        prompt_tokens=args.prompt_tokens,
        answer_tokens=args.max_tokens,
        cpu_s=cpu_s,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
