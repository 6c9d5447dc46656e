"""`macrame bench`: what a ring does for 1..N users; a config's ring, started here, or one that runs."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.arguments import Parser
from cluster.bench import Bench, Load, planned
from cluster.bench_client import Endpoint
from cluster.bench_plot import draw_bench
from cluster.config import load_config
from cluster.errors import EXIT_OK, UserError
from cluster.length import check_length
from cluster.plan_plot import plot_path
from deploy.bench_prompts import DATASETS, prompts
from deploy.bench_text import render
from deploy.bring_up import running
from deploy.client import Client
from deploy.command import INTERRUPTED, run_command
from deploy.narrow import width_of
from deploy.out_file import check_out_file
from deploy.state_line import StateLine
from deploy.target import DEFAULT_URL, client_of

SEED_BITS = 31


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or one JSON object, after Ctrl-C of what was measured until then; the exit code."""
    parser = Parser(
        prog="macrame bench",
        description="Tokens per second for one user and for several at once, with the waits for the first "
        "token and between tokens, hops, stages' busy shares and CPU time: of a ring that runs, or of a "
        "config's ring that is started on this machine for it. The end of a text is ignored: every answer "
        "is as long as asked. Ctrl-C ends it with what was measured so far.",
        examples=(
            ("macrame bench --url http://127.0.0.1:8080", "a ring that runs"),
            ("macrame bench --config cluster.json --concurrency 1,4,8 --json", "started here; JSON to keep"),
            (
                "macrame bench --config cluster.json --concurrency 1,4,16 --plot bench.svg",
                "drawn, too",
            ),
        ),
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config", type=Path, help="a cluster file whose ring is started here for the bench")
    group.add_argument("--url", help=f"a ring that runs, such as {DEFAULT_URL}")
    _add_load(parser)
    parser.add_argument("--plot", type=plot_path, metavar="FILE.svg", help="also draw it, as .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame bench", lambda: _bench(args), is_verbose=args.verbose)


def _add_load(parser: Parser) -> None:
    parser.add_argument(
        "--concurrency",
        type=_counts,
        default=(1, 2, 4),
        metavar="N,...",
        help="users at once (default 1,2,4)",
    )
    parser.add_argument(
        "--prompt-tokens", type=_count, default=128, metavar="N", help="of each prompt (default 128)"
    )
    parser.add_argument(
        "--output-tokens",
        "--max-tokens",
        type=_count,
        default=128,
        metavar="N",
        help="of each answer (default 128); --max-tokens is its older name",
    )
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="random",
        help="random: token ids (default); demo: text that the demo model was not trained on",
    )
    parser.add_argument(
        "--requests",
        type=_count,
        default=3,
        metavar="N",
        help="of each user, one after another (default 3)",
    )
    parser.add_argument(
        "--warm-up",
        type=_count_or_none,
        default=1,
        metavar="N",
        help="short answers to each user before each measurement (default 1; 0: none)",
    )
    parser.add_argument(
        "--seed",
        type=_count_or_none,
        metavar="N",
        help="of the prompts (default: 0 with --config; another each time with --url, where the ring may "
        "know those of the last time)",
    )


def _bench(args: argparse.Namespace) -> int:
    if args.plot is not None:
        check_out_file(args.plot, "--plot")
    if args.url is not None:
        return _measure(args, client_of(argparse.Namespace(config=None, url=args.url)), None)
    check_length(args.prompt_tokens, args.output_tokens, load_config(args.config).context, str(args.config))
    with running(args.config, sys.stderr) as ring:
        return _measure(args, ring.client, ring.processes.cpu_s)


def _measure(args: argparse.Namespace, client: Client, cpu_s: Callable[[], float] | None) -> int:
    endpoint = Endpoint(client.url, client.key)
    load = Load(args.concurrency, args.prompt_tokens, args.output_tokens, args.requests, args.warm_up)
    seed = args.seed
    if seed is None:
        seed = secrets.randbits(SEED_BITS) if args.url is not None else 0
    cluster, progress = planned(endpoint), _Progress()
    if args.dataset == "demo":
        progress.show("reading the demo model's held-out text", "")
    drawn = prompts(args.dataset, cluster["vocab_size"], args.prompt_tokens, seed)
    if max(load.concurrencies) > cluster["max_active"]:
        print(
            f"note: this plan serves {cluster['max_active']} at once (concurrency of the cluster file); more "
            "users wait in its queue, and their times have that wait",
            file=sys.stderr,
        )
    bench = Bench(endpoint, load, prompts=drawn, cpu_s=cpu_s, show=progress.show)
    try:
        bench.measure()
    except KeyboardInterrupt:
        _tell(args, bench, seed)
        return INTERRUPTED
    except UserError:
        _tell(args, bench, seed)
        raise
    _tell(args, bench, seed)
    return EXIT_OK


def _tell(args: argparse.Namespace, bench: Bench, seed: int) -> None:
    """Print and draw what was measured, if anything was."""
    if not bench.runs:
        return
    if sys.stderr.isatty():
        print(file=sys.stderr)
    result = bench.result() | {"dataset": args.dataset, "seed": seed}
    print(json.dumps(result, indent=2) if args.json else render(result, width_of(sys.stdout)), flush=True)
    if args.plot is not None:
        draw_bench(result, args.plot)


class _Progress:
    """What is going on, on standard error; how far it is, only on a terminal."""

    def __init__(self) -> None:
        self._line = StateLine(sys.stderr)
        self._has_detail = sys.stderr.isatty()

    def show(self, what: str, detail: str) -> None:
        self._line.show(f"{what}: {detail}" if self._has_detail and detail else what)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _count_or_none(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 on")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
