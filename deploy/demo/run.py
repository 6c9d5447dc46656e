"""`macrame demo`: a ring of three processes on this machine answers once through the HTTP API, then stops."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cluster.arguments import Parser
from cluster.config import ClusterConfig, load_config
from cluster.config_read import read_document
from cluster.errors import EXIT_OK, UserError
from cluster.plan_inputs import plan_nodes
from cluster.probe import this_machine
from deploy.client import Client
from deploy.command import run_command
from deploy.generate import Timing, stream_answer
from deploy.local_ring import LocalRing, free_ports, is_free
from deploy.sizes import size
from deploy.state_line import StateLine
from deploy.status import own_bytes
from deploy.target import client_for
from planner.plan import Plan
from planner.render import render_plan, table

CONFIG = Path(__file__).resolve().parent / "cluster.json"
PROMPT = "def fibonacci(n):"
READY_LIMIT_S = 180.0
STOP_LIMIT_S = 5.0
POLL_S = 0.1


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns 0 only if it answered and everything stopped."""
    parser = Parser(prog="macrame demo", description="Three nodes on this machine, one streamed answer.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another cluster file, all of it here")
    parser.add_argument("--prompt", default=PROMPT, help=f"default: {PROMPT}")
    parser.add_argument("--max-tokens", type=int, default=120, metavar="N", help="default 120")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("macrame demo", lambda: _demo(args), is_verbose=args.verbose)


def _demo(args: argparse.Namespace) -> int:
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), _interrupt)
    with tempfile.TemporaryDirectory(prefix="macrame-demo-") as folder:
        config_path = _with_free_ports(args.config, Path(folder))
        config = load_config(config_path)
        if not config.is_loopback:
            raise UserError(f"{args.config} names other machines; the demo runs on this one alone")
        ring = LocalRing(config_path, [node.rank for node in config.nodes if node.use], Path(folder))
        client = client_for(config)
        with _stopping(ring):
            print(f"Starting {len(config.nodes)} nodes on this machine ...", flush=True)
            ring.start()
            _wait_until_ok(ring, client, StateLine(sys.stdout))
            print(f"\n{_plan_table(config, client)}\n")
            timing = _answer(ring, client, args.prompt, args.max_tokens)
            print(f"\n{_report(client.get('/v1/cluster'), timing)}\n")
    return EXIT_OK


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _with_free_ports(path: Path, folder: Path) -> Path:
    """The config itself, or a copy in `folder` with other ports in place of taken ones."""
    config, document = load_config(path), read_document(path)
    if not isinstance(document, dict) or "nodes" not in document:
        return path
    api = document.setdefault("api", {})
    places = [(own, node.host, node.port) for own, node in zip(document["nodes"], config.nodes, strict=True)]
    places.append((api, config.api.host, config.api.port))
    taken = [(place, port) for place, host, port in places if not is_free(host, port)]
    if not taken:
        return path
    for (place, port), other in zip(taken, free_ports("127.0.0.1", len(taken)), strict=True):
        print(f"Port {port} is taken here, so the demo uses {other} in its place.")
        place["port"] = other
    local = config.model_dir_base / config.model
    if local.is_dir():
        document["model"] = str(local)
    copy = folder / "cluster.json"
    copy.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return copy


@contextlib.contextmanager
def _stopping(ring: LocalRing) -> Iterator[None]:
    """Stops the ring however the block ends, and says how that went. Raises UserError for a left-over."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted: stopping the nodes ...", flush=True)
        raise
    finally:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # nothing may cut the stop short
        begin = time.monotonic()
        left = ring.stop(STOP_LIMIT_S)
        if left:
            print(f"These did not stop within {STOP_LIMIT_S:.0f} s and were killed: {'; '.join(left)}")
        else:
            print(f"All nodes stopped in {time.monotonic() - begin:.1f} s.", flush=True)
    if left:
        raise UserError("the ring answered, but did not stop by itself")


def _wait_until_ok(ring: LocalRing, client: Client, line: StateLine) -> None:
    """Shows what the ring does until /health is ok. Raises UserError if a node ends or time is up."""
    deadline = time.monotonic() + READY_LIMIT_S
    while True:
        ring.check()
        try:
            health = client.get("/health")
        except UserError:
            health = {"status": "starting", "reason": "the HTTP process is not there yet"}
        if health["status"] == "ok":
            line.end("The ring is ready.")
            return
        if time.monotonic() > deadline:
            logs = "\n".join(f"node {rank}:\n{ring.tail(rank)}" for rank in ring.pids())
            why = health.get("reason")
            raise UserError(f"the ring was not ready after {READY_LIMIT_S:.0f} s: {why}\n{logs}")
        line.show(f"{health['status']}: {health.get('reason', '')}")
        time.sleep(POLL_S)


def _plan_table(config: ClusterConfig, client: Client) -> str:
    plan = Plan.from_json(json.dumps(client.get("/v1/cluster")["plan"]))
    here = this_machine()
    return render_plan(plan, plan_nodes(config, {node.rank: here for node in config.nodes}))


def _answer(ring: LocalRing, client: Client, prompt: str, max_tokens: int) -> Timing:
    """Streams one answer to the terminal. Raises UserError; a node that ended is the better explanation."""
    print(f"POST {client.url}/v1/completions  temperature 0, {max_tokens} tokens at most\n")
    print(prompt, end="", flush=True)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    try:
        return stream_answer(client, body, lambda text: print(text, end="", flush=True))
    except UserError:
        ring.check()
        raise
    finally:
        print()


def _report(cluster: dict[str, Any], timing: Timing) -> str:
    """What the answer took, and what each node loaded of the model."""
    rows, whole_bytes = [], 0
    for node in cluster["nodes"]:
        told = node["node"]
        own, whole = own_bytes(told["footprint"]), told["footprint"]["full_model_bytes"]
        whole_bytes = max(whole_bytes, whole)
        rows.append(
            {
                "rank": str(node["rank"]),
                "node": node["name"],
                "layers": f"{told['start']}:{told['stop']}",
                "loaded": size(own),
                "whole model": size(whole),
                "share": f"{own / whole:.0%}" if whole else "",
            }
        )
    lines = [str(timing), "", *table(rows)]
    if sum(own_bytes(node["node"]["footprint"]) for node in cluster["nodes"]) > whole_bytes:
        lines.append("(More than the whole together: the embedding is also the head, so two nodes hold it.)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
