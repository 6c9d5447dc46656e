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
from cluster.config import load_config
from cluster.errors import EXIT_ERROR, EXIT_OK, UserError
from deploy.client import Client
from deploy.command import run_command
from deploy.generate import Timing, stream_answer
from deploy.local_ring import LocalRing, free_ports, is_free
from deploy.status import own_bytes
from deploy.table import size, table
from deploy.target import client_for
from planner.plan import Plan

CONFIG = Path(__file__).resolve().parent / "cluster.json"
PROMPT = "def fibonacci(n):"
READY_LIMIT_S = 180.0
STOP_LIMIT_S = 5.0
POLL_S = 0.1


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns 0 only if it answered and everything stopped."""
    parser = Parser(prog="macrame demo", description="Three nodes on this machine, one streamed answer.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="a cluster file whose hosts are all this one")
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
            plan = _wait_until_ok(ring, client)
            print(_plan_table(plan))
            timing = _answer(client, args.prompt, args.max_tokens)
            ring.check()
            print(_report(client.get("/v1/cluster"), timing))
    return EXIT_OK


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _with_free_ports(path: Path, folder: Path) -> Path:
    """The config itself, or a copy in `folder` with other ports in place of taken ones."""
    config = load_config(path)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    api = document.setdefault("api", {})
    places = [(node, config.nodes[rank].host, config.nodes[rank].port) for rank, node in enumerate(document["nodes"])]
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
