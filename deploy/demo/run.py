"""`macrame demo`: a ring of three processes on this machine answers once through the HTTP API, then stops."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.console import look_of
from cluster.errors import EXIT_OK, UserError
from cluster.plan_inputs import plan_nodes
from cluster.probe import this_machine
from deploy.answer import Timing, stream_answer
from deploy.bring_up import Running, running
from deploy.command import run_command
from deploy.status import own_bytes
from planner.plan import Plan
from planner.render import render_plan, table
from planner.sizes import size

CONFIG = Path(__file__).resolve().parent / "cluster.json"
PROMPT = "def fibonacci(n):"


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns 0 only if it answered and everything stopped."""
    parser = Parser(
        prog="macrame demo",
        description="Three nodes on this machine with a small model that comes along, one streamed answer "
        "through the HTTP API, and what each node loaded; then all of it stops.",
        examples=(
            ("macrame demo", "no download, done in less than a minute"),
            ('macrame demo --prompt "class Stack:" --max-tokens 200', "another answer, a longer one"),
        ),
    )
    parser.add_argument(
        "--config", type=Path, default=CONFIG, help="another cluster file, all of it on this machine"
    )
    parser.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help=f"the text to go on from (default: {PROMPT})"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=120, metavar="N", help="of the answer, at most (default 120)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, all else on stderr")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame demo", lambda: _demo(args), is_verbose=args.verbose)


def _demo(args: argparse.Namespace) -> int:
    if args.json:
        return _demo_json(args)
    with running(args.config, sys.stdout) as ring:
        print(f"\n{_plan_table(ring)}\n")
        timing = _answer(ring, args.prompt, args.max_tokens)
        print(f"\n{_report(ring.client.get('/v1/cluster'), timing)}\n", flush=True)
    return EXIT_OK


def _demo_json(args: argparse.Namespace) -> int:
    with running(args.config, sys.stderr) as ring:
        texts: list[str] = []
        body = {"prompt": args.prompt, "max_tokens": args.max_tokens, "temperature": 0}
        timing = stream_answer(ring.client, body, texts.append)
        cluster = ring.client.get("/v1/cluster")
    told = {
        "prompt": args.prompt,
        "answer": "".join(texts),
        "num_tokens": timing.num_tokens,
        "tok_s": timing.tok_s,
        "first_token_s": timing.first_s,
        "nodes": [
            {
                "rank": node["rank"],
                "name": node["name"],
                "start": node["node"]["start"],
                "stop": node["node"]["stop"],
                "loaded_bytes": own_bytes(node["node"]["footprint"]),
                "full_model_bytes": node["node"]["footprint"]["full_model_bytes"],
            }
            for node in cluster["nodes"]
        ],
    }
    print(json.dumps(told, indent=2))
    return EXIT_OK


def _plan_table(ring: Running) -> str:
    """The plan that the head made, with this machine's figures where the config gives none."""
    plan = Plan.from_json(json.dumps(ring.client.get("/v1/cluster")["plan"]))
    here = this_machine()
    nodes = plan_nodes(ring.config, {node.rank: here for node in ring.config.nodes})
    return render_plan(plan, nodes, look=look_of(sys.stdout))


def _answer(ring: Running, prompt: str, max_tokens: int) -> Timing:
    """Streams one answer to the terminal. Raises UserError; a node that ended is the better explanation."""
    print(f"POST {ring.client.url}/v1/completions  temperature 0, {max_tokens} tokens at most\n")
    print(prompt, end="", flush=True)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    try:
        return stream_answer(ring.client, body, lambda text: print(text, end="", flush=True))
    except UserError:
        ring.processes.check()
        raise
    finally:
        print(flush=True)


def _report(cluster: dict[str, Any], timing: Timing) -> str:
    """What the answer took, and what each node loaded of the model."""
    rows, whole_bytes, sum_bytes = [], 0, 0
    for node in cluster["nodes"]:
        told = node["node"]
        own = own_bytes(told["footprint"])
        whole_bytes = max(whole_bytes, told["footprint"]["full_model_bytes"])
        sum_bytes += own
        rows.append(
            {
                "rank": str(node["rank"]),
                "node": node["name"],
                "layers": f"{told['start']}:{told['stop']}",
                "loaded": size(own),
                "whole model": size(told["footprint"]["full_model_bytes"]),
                "share": f"{own / max(1, whole_bytes):.0%}",
            }
        )
    lines = [str(timing), "", *table(rows)]
    if sum_bytes > whole_bytes:
        lines.append("(More than the whole together: the embedding is also the head, so two nodes hold it.)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
