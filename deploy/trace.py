"""`macrame trace`: one request's way through the whole ring as a timeline, and where its milliseconds went.

One thread, and those of cluster/trace_client.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.config import ClusterConfig, load_config
from cluster.console import say
from cluster.errors import EXIT_ERROR, EXIT_OK, UserError
from cluster.length import check_length
from cluster.plan_plot import plot_path
from cluster.tls import own_credentials
from cluster.trace_client import Choices
from cluster.trace_plot import draw_trace
from cluster.trace_run import MAX_TOKENS, Ask, as_json, prompts_for, trace_ring
from deploy.bring_up import may_start, running
from deploy.command import run_command
from deploy.demo.run import CONFIG as DEMO_CONFIG
from deploy.narrow import width_of
from deploy.out_file import check_out_file
from deploy.target import DEFAULT_URL, client_of
from deploy.trace_text import render

FILE = Path("macrame-trace.json")
HTTP_S = 600.0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for a whole trace, 1 for a partial one, 4 where a node is away, 3 for a wrong question."""
    args = _parser().parse_args(argv)
    return run_command("macrame trace", lambda: _run(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame trace",
        description="Send one request of random tokens through a ring and record what each node does with "
        "it: waiting, building the graph, computing, sampling, copying, the way between nodes. Writes a "
        "timeline of the whole ring, in which others' frames show too, and prints where a token's "
        "milliseconds went.",
        examples=(
            ("macrame trace", "the demo's ring, started on this machine for it"),
            ("macrame trace --config cluster.json", "the ring of a file; started here if none runs"),
            ("macrame trace --url http://127.0.0.1:8080 --json", "a ring that runs, through its API"),
            ("macrame trace --config cluster.json --layers", "every layer by itself, which takes longer"),
        ),
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--config",
        type=Path,
        help="the ring of this cluster file; if its nodes are all on this machine and none runs, it is "
        "started for the trace",
    )
    group.add_argument("--url", help=f"a ring that runs, such as {DEFAULT_URL}")
    parser.add_argument("--tokens", type=_tokens, default=32, metavar="N", help="of the answer (default 32)")
    parser.add_argument(
        "--prompt-tokens", type=_count, default=32, metavar="N", help="of the prompt (default 32)"
    )
    parser.add_argument(
        "--layers",
        type=_count,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="evaluate every N layers by themselves (1 without a number) and show each; this changes the "
        "timing",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="with --layers: also while others are served, who are slowed"
    )
    parser.add_argument("--no-warm-up", action="store_true", help="trace the very first request")
    parser.add_argument(
        "--out", type=Path, default=FILE, metavar="FILE", help=f"where the timeline goes (default {FILE})"
    )
    parser.add_argument("--plot", type=plot_path, metavar="FILE.svg", help="draw two tokens, as .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _run(args: argparse.Namespace) -> int:
    check_out_file(args.out, "--out")
    if args.plot is not None:
        check_out_file(args.plot, "--plot")
    if args.url is not None:
        return _tell(args, *_over_http(args))
    check_config(args)
    return with_ring(args.config, lambda config: _tell(args, *_over_grpc(args, config)))


def check_config(args: argparse.Namespace) -> None:
    """Raises UserError where --config has less context than is asked for: before a ring is started for it."""
    if args.config is not None:
        check_length(args.prompt_tokens, args.tokens, load_config(args.config).context, str(args.config))


def with_ring(path: Path | None, work: Callable[[ClusterConfig], int]) -> int:
    """Do the work with the ring of this file, started here where none runs; None: the demo's."""
    if path is not None:
        config = load_config(path)
        if not may_start(config):
            return work(config)
    with running(path or DEMO_CONFIG, sys.stderr) as ring:
        return work(ring.config)


def _over_grpc(args: argparse.Namespace, config: ClusterConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    credentials = own_credentials(config)
    drawn = prompts_for(config, credentials, args.prompt_tokens, args.tokens)
    ask = Ask(drawn, args.tokens, not args.no_warm_up, args.anyway)
    traced = trace_ring(config, credentials, ask, Choices(args.layers), _progress)
    return traced.summary(), traced.file()


def _over_http(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    client = client_of(argparse.Namespace(config=None, url=args.url))
    _progress(f"asking {client.url}")
    body = {
        "tokens": args.tokens,
        "prompt_tokens": args.prompt_tokens,
        "layers_per_span": args.layers,
        "is_forced": args.anyway,
        "is_warmed": not args.no_warm_up,
    }
    reply = client.post("/v1/cluster/trace", body, HTTP_S)
    if not isinstance(reply.get("summary"), dict) or not isinstance(reply.get("trace"), dict):
        raise UserError(f"{client.url}/v1/cluster/trace gave no trace; is it an older macrame?", EXIT_ERROR)
    return reply["summary"], reply["trace"]


def _tell(args: argparse.Namespace, summary: dict[str, Any], file: dict[str, Any]) -> int:
    try:
        args.out.write_text(as_json(file) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{args.out} cannot be written: {error.strerror or error}; give another --out", EXIT_ERROR
        ) from error
    found = summary | {"file": str(args.out)}
    print(json.dumps(found, indent=2) if args.json else render(found, width_of(sys.stdout)), flush=True)
    if args.plot is not None and summary["parts"]:
        draw_trace(file, args.plot)
    return EXIT_ERROR if summary["trouble"] else EXIT_OK


def _progress(line: str) -> None:
    say(f"macrame trace: {line}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _tokens(text: str) -> int:
    count = _count(text)
    if count > MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text} is more than the {MAX_TOKENS} that nodes keep records of")
    return count


if __name__ == "__main__":
    sys.exit(main())
