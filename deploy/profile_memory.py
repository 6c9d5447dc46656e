"""`macrame profile --memory`: bytes of every node over a load and a generation, beside what was predicted."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, load_config
from cluster.console import say
from cluster.errors import EXIT_ERROR, EXIT_OK, UserError
from cluster.length import check_length
from cluster.memory_run import MemoryProfile, profile_memory, tracing_memory
from cluster.tls import own_credentials
from cluster.trace_client import Tracing
from cluster.trace_run import Ask, as_json, prompts_for
from deploy.bring_up import READY_LIMIT_S, may_start, running
from deploy.demo.run import CONFIG as DEMO_CONFIG
from deploy.narrow import fitted, width_of
from deploy.out_file import check_out_file

FILE = Path("macrame-memory.json")
NUM_TOKENS, NUM_PROMPT_TOKENS = 32, 128


def add_memory(parser: argparse.ArgumentParser) -> None:
    """The options that go with --memory."""
    group = parser.add_argument_group("with --memory")
    group.add_argument(
        "--memory",
        action="store_true",
        help="bytes of each node of a ring over a load and an answer, instead of speeds",
    )
    group.add_argument(
        "--config",
        type=Path,
        help="the ring of this cluster file; if its nodes are all on this machine and none runs, it is "
        "started for this, and the load is seen too (default: the demo's ring, started here)",
    )
    group.add_argument("--tokens", type=_count, metavar="N", help=f"of the answer (default {NUM_TOKENS})")
    group.add_argument(
        "--prompt-tokens", type=_count, metavar="N", help=f"of the prompt (default {NUM_PROMPT_TOKENS})"
    )
    group.add_argument("--out", type=Path, metavar="FILE", help=f"where the timeline goes (default {FILE})")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 where it is partial. Raises UserError."""
    args.tokens = args.tokens or NUM_TOKENS
    args.prompt_tokens = args.prompt_tokens or NUM_PROMPT_TOKENS
    args.out = args.out or FILE
    check_out_file(args.out, "--out")
    if args.config is not None:
        config = load_config(args.config)
        check_length(args.prompt_tokens, args.tokens, config.context, str(args.config))
        if not may_start(config):
            tracing = tracing_memory(config, own_credentials(config))
            tracing.start()
            return _profile(args, config, tracing, has_load=False)
    return _with_load(args, args.config or DEMO_CONFIG)


def _with_load(args: argparse.Namespace, path: Path) -> int:
    """Start the ring; its nodes record from the moment in which they listen."""
    tracings: list[tuple[Tracing, Future[None]]] = []
    with ThreadPoolExecutor(1) as waiting:

        def begin(config: ClusterConfig) -> None:
            tracing = tracing_memory(config, own_credentials(config))
            tracings.append((tracing, waiting.submit(tracing.start, READY_LIMIT_S)))

        try:
            with running(path, sys.stderr, on_start=begin) as ring:
                ((tracing, begun),) = tracings
                begun.result()
                return _profile(args, ring.config, tracing, has_load=True)
        finally:
            for tracing, _ in tracings:
                tracing.abandon()


def _profile(args: argparse.Namespace, config: ClusterConfig, tracing: Tracing, *, has_load: bool) -> int:
    credentials = own_credentials(config)
    try:
        drawn = prompts_for(config, credentials, args.prompt_tokens, args.tokens)
    except UserError:
        tracing.stop()
        raise
    ask = Ask(drawn, args.tokens)
    found = profile_memory(config, credentials, ask, tracing, has_load=has_load, say=_progress)
    return _tell(args, found)


def _tell(args: argparse.Namespace, found: MemoryProfile) -> int:
    try:
        args.out.write_text(as_json(found.file()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{args.out} cannot be written: {error.strerror or error}; give another --out", EXIT_ERROR
        ) from error
    told = found.summary() | {"file": str(args.out)}
    print(json.dumps(told, indent=2) if args.json else render(told, width_of(sys.stdout)), flush=True)
    return EXIT_ERROR if found.trouble else EXIT_OK


def render(told: dict[str, Any], width: int | None = None) -> str:
    """The object of `macrame profile --memory --json` for people. Pure."""
    over = "a load and an answer" if told["has_load"] else "an answer (the ring was loaded before)"
    lines = [f"{told['model']}: {over} of {told['prompt_tokens']} + {told['tokens']} tokens; MB", ""]
    lines += fitted([_row(node) for node in told["nodes"]], width)
    lines += [
        "",
        "measured / predicted; predicted are all users' whole contexts, and resident has Python and MLX "
        "themselves (import) besides",
        *(f"partial: {trouble}" for trouble in told["trouble"]),
        f"the timeline is in {told['file']}: open it at https://ui.perfetto.dev",
    ]
    return "\n".join(lines)


def _row(node: dict[str, Any]) -> dict[str, str]:
    measured, predicted = node["measured"], node["predicted"] or {}

    def both(key: str, planned: str) -> str:
        told = f"{measured[key] / 1e6:.1f}"
        return f"{told} / {predicted[planned] / 1e6:.1f}" if planned in predicted else told

    load_s = node["load_s"]
    return {
        "node": node["name"],
        "weights": both("weight_bytes", "weight_bytes"),
        "KV": both("kv_bytes", "kv_bytes"),
        "activations": both("activation_bytes", "activation_bytes"),
        "MLX peak": both("mlx_peak_bytes", "sum_bytes"),
        "MLX cache": f"{measured['cache_bytes'] / 1e6:.1f}",
        "resident peak": f"{measured['peak_rss_bytes'] / 1e6:.1f}",
        "import": f"{measured['import_rss_bytes'] / 1e6:.1f}",
        "load s": "-" if load_s is None else f"{load_s:.2f}",
    }


def _progress(line: str) -> None:
    say(f"macrame profile: {line}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)
