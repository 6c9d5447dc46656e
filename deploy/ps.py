"""`macrame ps`: the requests that a running ring works on, from /v1/cluster. One thread."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from cluster.arguments import Parser
from cluster.errors import EXIT_OK, UserError
from deploy.client import Client
from deploy.command import run_command
from deploy.narrow import fitted, width_of
from deploy.rate import Rate
from deploy.target import add_target, client_of
from deploy.watch import add_watch, watch

_SHOWN = ("model", "status", "reason", "context", "num_active", "max_active", "num_queued")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if the ring answers, else 4 or 1."""
    parser = Parser(
        prog="macrame ps",
        description="The requests that a running ring works on or has queued: how long they are there, and "
        "how many tokens each has.",
        examples=(
            ("macrame ps", "now"),
            ("macrame ps --watch", "live, with the tokens per second of each, until Ctrl-C"),
            ("macrame ps --json --watch 5 >> ps.jsonl", "a line every five seconds"),
        ),
    )
    add_target(parser)
    add_watch(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame ps", lambda: _run(args, client_of(args)), is_verbose=args.verbose)


def _run(args: argparse.Namespace, client: Client) -> int:
    rate = Rate()

    def frame() -> str:
        cluster = client.cluster()
        if args.json:
            told = {key: cluster.get(key) for key in _SHOWN} | {"requests": _requests(cluster)}
            return json.dumps(told, indent=None if args.watch else 2)
        return render(cluster, rate, width_of(sys.stdout), now_s=time.monotonic())

    if args.watch:
        return watch(frame, args.watch, trouble=_as_json if args.json else str)
    print(frame())
    return EXIT_OK


def _as_json(error: UserError) -> str:
    return json.dumps({"status": "unreachable", "reason": str(error), "requests": []})


def _requests(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises UserError for a ring that does not list them."""
    requests = cluster.get("requests")
    if not isinstance(requests, list):
        raise UserError("this ring does not list its requests: it runs an older macrame, so update its head")
    return requests


def render(cluster: dict[str, Any], rate: Rate, width: int | None, *, now_s: float) -> str:
    """A line about the ring and a row for each request; `rate` knows the frame before."""
    head = f"{cluster['model']}: {cluster['status']}"
    if cluster.get("plan"):
        head += (
            f", {cluster['num_active']} of {cluster['max_active']} running, {cluster['num_queued']} queued"
        )
    requests = _requests(cluster)
    tok_s = rate.update({str(r["id"]): r["completion_tokens"] for r in requests}, now_s)
    rows = [_row(request, tok_s.get(str(request["id"]))) for request in requests]
    return "\n".join([head, "", *(fitted(rows, width) if rows else ["no requests"])])


def _row(request: dict[str, Any], tok_s: float | None) -> dict[str, str]:
    return {
        "request": str(request["id"])[-12:],
        "state": _state(request),
        "model": str(request.get("adapter") or request.get("model") or ""),
        "prompt": f"{request['prompt_tokens']}",
        "answer": f"{request['completion_tokens']}",
        "tokens/s": "" if tok_s is None else f"{tok_s:.1f}",
        "for": f"{request['age_s']:.1f} s",
    }


def _state(request: dict[str, Any]) -> str:
    """The state; while the prompt is read, with how far it is."""
    read = request.get("prefilled_tokens")
    if request["state"] != "prefill" or read is None or not request["prompt_tokens"]:
        return str(request["state"])
    return f"prefill {read / request['prompt_tokens']:.0%}"


if __name__ == "__main__":
    sys.exit(main())
