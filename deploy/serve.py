"""`macrame serve MODEL`: a model on this machine behind the HTTP API, in the foreground. Main thread only."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.config import ClusterConfig, ConfigError, is_loopback, load_config
from cluster.console import as_word
from cluster.errors import EXIT_OK, EXIT_USAGE, UserError
from deploy.bring_up import Running, running
from deploy.command import run_command
from deploy.local_ring import free_ports
from deploy.log_follower import LogFollower
from deploy.screen import Screen
from deploy.target import DEFAULT_URL
from shard_loader.folder import find_folder
from shard_loader.sources import HubError

POLL_S = 0.2
MACHINE_LINE = "NODE_READY "  # for programs, not for people
DEFAULT_PORT = 8080
_OF_A_MODEL = ("host", "port", "context", "concurrency", "kv_bits", "max_memory_gb", "keys_file")


def main(argv: list[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM: then exit code 0. Else that of what went wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.model is None) == (args.config is None):
        parser.error("give a MODEL, or --config with a cluster file")
    given = [name for name in _OF_A_MODEL if getattr(args, name) is not None]
    if args.config is not None and given:
        flag = f"--{given[0].replace('_', '-')}"
        parser.error(f"{flag} is for a MODEL: with --config, the cluster file says it")
    return run_command("macrame serve", lambda: _serve(args), is_verbose=args.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog="macrame serve",
        description="Serve a model on this machine alone, without a cluster file; or with --config all nodes "
        "of a cluster file that are on this machine, such as for a try. It stays in the foreground, shows "
        "what the nodes log, and Ctrl-C stops all of it. A model of the hub is fetched first.",
        examples=(
            (
                "macrame serve mlx-community/Qwen3-1.7B-8bit",
                f"at {DEFAULT_URL}/v1; then: macrame chat",
            ),
            (
                "macrame serve ./my-model --port 9000 --context 16384",
                "a folder, and another port",
            ),
            (
                "macrame serve ./my-model --host 0.0.0.0 --keys-file keys.txt",
                "for other machines, which need one of the keys",
            ),
            ("macrame serve --config cluster.json", "every node of a file whose hosts are this machine"),
        ),
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, or a model of the hub")
    parser.add_argument("--config", type=Path, help="a cluster file, all of whose nodes are on this machine")
    group = parser.add_argument_group("with a MODEL")
    group.add_argument("--host", help="where the API listens (default 127.0.0.1)")
    group.add_argument("--port", type=int, metavar="N", help=f"its port (default {DEFAULT_PORT})")
    group.add_argument("--keys-file", type=Path, metavar="FILE", help="the API keys, one a line")
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a request, prompt and answer (default: the smaller of 8192 and the model's)",
    )
    group.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default 1)")
    group.add_argument(
        "--kv-bits",
        type=int,
        metavar="N",
        help="keep keys and values in 8 or 4 bits (default: not quantised)",
    )
    group.add_argument(
        "--max-memory-gb",
        type=float,
        metavar="GB",
        help="the most memory that it may take, in GB of 10^9 bytes (default: what the planner finds)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line: ready, stopped")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _serve(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="macrame-serve-") as folder:
        path = args.config
        if path is None:
            path = Path(folder) / "cluster.json"
            path.write_text(json.dumps(config_for(args), indent=2), encoding="utf-8")
        config = load_config(path) if args.config is not None else _checked(path)
        if not config.is_loopback:
            raise UserError(
                f"{path} names other machines, and serve runs nodes on this one: "
                f"'macrame up --config {as_word(path)}' starts them all",
                EXIT_USAGE,
            )
        with running(path, sys.stderr, keeps_ports=True, limit_s=None) as ring:
            _tell_ready(ring, is_json=args.json)
            try:
                _watch(ring)
            except KeyboardInterrupt:
                print("\nStopping ...", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"event": "stopped"}), flush=True)
    return EXIT_OK


def _checked(path: Path) -> ClusterConfig:
    """The config that was made of the options. Raises UserError that names the option, not our file."""
    try:
        config = load_config(path)
        config.api_keys()
        return config
    except ConfigError as error:
        message = str(error).removeprefix(f"{path}: ")
        for key in ("api.keys_file", "load.kv_bits", "nodes[0].max_memory_gb", "context", "concurrency"):
            if message.startswith(key):
                flag = f"--{key.rpartition('.')[2].replace('_', '-')}"
                message = f"{flag}{message.removeprefix(key)}"
        raise UserError(message, EXIT_USAGE) from None


def config_for(args: argparse.Namespace) -> dict[str, Any]:
    """A cluster file with one node. Raises UserError for a host that needs keys, and a port that is none."""
    host = args.host or "127.0.0.1"
    port = DEFAULT_PORT if args.port is None else args.port
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port} is not a port (1 to 65535)", EXIT_USAGE)
    if not is_loopback(host) and args.keys_file is None and not os.environ.get("MACRAME_API_KEYS"):
        raise UserError(
            f"--host {host} lets other machines in, which needs API keys: write one a line into a file for "
            "--keys-file, or set MACRAME_API_KEYS",
            EXIT_USAGE,
        )
    node_port = next(free for free in free_ports("127.0.0.1", 2) if free != port)
    node: dict[str, Any] = {"name": _own_name(), "host": "127.0.0.1", "port": node_port}
    if args.max_memory_gb is not None:
        node["max_memory_gb"] = args.max_memory_gb
    api: dict[str, Any] = {"host": host, "port": port}
    if args.keys_file is not None:
        api["keys_file"] = str(args.keys_file.expanduser().resolve())
    try:
        local = find_folder(args.model, Path.cwd())
    except HubError as error:
        raise UserError(str(error), EXIT_USAGE) from None
    content: dict[str, Any] = {
        "model": args.model if local is None else str(local.resolve()),
        "nodes": [node],
        "api": api,
    }
    if args.context is not None:
        content["context"] = args.context
    if args.concurrency is not None:
        content["concurrency"] = args.concurrency
    return content | ({} if args.kv_bits is None else {"load": {"kv_bits": args.kv_bits}})


def _own_name() -> str:
    return socket.gethostname().partition(".")[0] or "node"


def _tell_ready(ring: Running, *, is_json: bool) -> None:
    client, model = ring.client, ring.client.model()
    if is_json:
        print(json.dumps({"event": "ready", "url": client.url, "model": model}), flush=True)
        return
    chat = "macrame chat" if client.url == DEFAULT_URL else f"macrame chat --url {client.url}"
    print(f"{model} is served at {client.url}/v1 until Ctrl-C.")
    print(f"Talk to it from another terminal: {chat}", flush=True)


def _watch(ring: Running) -> None:
    """Shows what the nodes log. Raises UserError as soon as one ends, KeyboardInterrupt at Ctrl-C."""
    names = {node.rank: node.name for node in ring.config.nodes}
    follower = LogFollower({names[rank]: ring.processes.log(rank) for rank in ring.processes.pids()})
    screen = Screen(sys.stderr)
    while True:
        for name, line in follower.lines():
            if not line.startswith(MACHINE_LINE):
                screen.note(line if len(names) == 1 else f"{name}: {line}")
        ring.processes.check()
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
