"""`python -m cluster.api`: the HTTP process. The main thread runs the event loop."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import logging
import math
import os
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from cluster.api.answer import KEEP_ALIVE_S
from cluster.api.app import make_app
from cluster.api.connection import Connection
from cluster.api.head_client import HeadClient
from cluster.api.sampling import SamplingDefaults
from cluster.api.service import Service
from cluster.api.tracing import Tracer
from cluster.api_process import FAILED, READY
from cluster.arguments import Parser
from cluster.config import ClusterConfig, is_loopback, load_config
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from cluster.lan_copy import find_as_the_head
from cluster.logs import Logs, add_log_arguments, log_choices, write_line
from cluster.tls import load_credentials
from cluster.tokenizer import load_tokenizer
from planner.embedding_files import EmbeddingModel, NoEmbeddingsError, read_embedding_model

logger = logging.getLogger("cluster.api.process")

STOP_S = 1  # for open streams to end in, once they have been told


class _Server(uvicorn.Server):
    """Says when it listens, and ends all streams with a sentence when it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit and sockets:
            host, port = sockets[0].getsockname()[:2]
            write_line(f"{READY} {host} {port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True  # a second signal changes nothing: the stop is bounded anyway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.head.fail_all("The server is stopping.", is_closing=True)
        await super().shutdown(sockets)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT, SIGTERM, or with --parent-pipe the end of standard input; returns the exit code."""
    args = _parse(argv)
    logs = None
    try:
        logs = Logs.relayed(args.rank) if args.parent_pipe else Logs(log_choices(args), args.rank)
        logs.begin()
        config = load_config(args.config, model=args.model)
        api = replace(
            config.api,
            host=config.api.host if args.host is None else args.host,
            port=config.api.port if args.port is None else args.port,
        )
        if not 0 <= args.rank < len(config.nodes):
            raise UserError(
                f"--rank {args.rank} is not in {args.config}, which has ranks 0 to {len(config.nodes) - 1}",
                EXIT_USAGE,
            )
        logs.node = config.nodes[args.rank].name
        return _serve(replace(config, api=api), args)
    except UserError as error:
        logger.info("it ended with exit code %d", error.exit_code, exc_info=True)
        if args.parent_pipe:
            _tell_parent(error)
        else:
            print(f"cluster.api: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        if logs is not None:
            logs.end()


def _tell_parent(error: UserError | str) -> None:
    """The parent says it, as the last thing that it says; one that has ended has said its own."""
    with contextlib.suppress(BrokenPipeError):
        write_line(f"{FAILED} {error}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="cluster.api", description="Serve OpenAI's endpoints in front of a head.")
    parser.add_argument("--config", type=Path, required=True, help="the cluster's JSON or YAML file")
    parser.add_argument("--model", help="a folder or a hub id, instead of the config's")
    parser.add_argument("--head", required=True, metavar="HOST:PORT", help="where rank 0 listens")
    parser.add_argument("--rank", type=int, default=0, help="whose certificate it shows the head (default 0)")
    parser.add_argument("--host", help="listen here instead of api.host")
    parser.add_argument("--port", type=int, help="listen here instead of api.port; 0: any free port")
    parser.add_argument(
        "--keep-alive-s",
        type=float,
        default=KEEP_ALIVE_S,
        help="a stream silent for so long gets a comment (default %(default)s)",
    )
    parser.add_argument("--parent-pipe", action="store_true", help="stop when standard input ends")
    add_log_arguments(parser)
    args = parser.parse_args(argv)
    if args.port is not None and not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not a port (0 to 65535)")
    if not 0 < args.keep_alive_s < math.inf:
        parser.error(f"--keep-alive-s {args.keep_alive_s} is not a time above 0 seconds")
    return args


def _serve(config: ClusterConfig, args: argparse.Namespace) -> int:
    keys = config.api_keys()
    if not is_loopback(config.api.host) and not keys:
        raise UserError(
            f"api.host = {config.api.host!r} is reachable from other machines, which needs API keys: "
            "set api.keys_file or MACRAME_API_KEYS",
            EXIT_USAGE,
        )
    listener = _listen(config.api.host, config.api.port)
    adapters = [adapter.name for adapter in config.load.adapters]
    credentials = load_credentials(config, args.rank)
    head = HeadClient(
        args.head, credentials, peer=config.nodes[0].name, silence_limit_s=config.silence_timeout_s
    )
    service = Service(
        config.model, config.model_dir_base, head, config.api.queue, adapters, keep_alive_s=args.keep_alive_s
    )
    service.tracer = Tracer(config, credentials)
    has_uvloop = importlib.util.find_spec("uvloop") is not None
    server = _Server(
        uvicorn.Config(
            make_app(service, keys),
            http=Connection,
            ws="none",
            loop="uvloop" if has_uvloop else "asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
        ),
        service,
    )
    failures: list[BaseException] = []

    def load() -> None:
        try:
            model_dir = find_as_the_head(config, args.head, credentials).folder
            tokenizer = load_tokenizer(model_dir)
            tokenizer.warm_up()
            service.use(tokenizer, SamplingDefaults.read(model_dir), _embedding(model_dir))
            gc.collect()
            gc.freeze()  # a full collection over all that was imported stops every stream for tens of ms
        except Exception as error:  # the thread's border: the process ends with it
            failures.append(error)
            server.should_exit = True

    def wait_for_parent() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        server.should_exit = True

    threading.Thread(target=load, name="tokenizer", daemon=True).start()
    if args.parent_pipe:
        threading.Thread(target=wait_for_parent, name="parent-pipe", daemon=True).start()
    with listener:
        server.run(sockets=[listener])
    if failures:
        logger.info("the tokenizer failed", exc_info=failures[0])
        raise UserError(str(failures[0])) from failures[0]
    return EXIT_OK


def _embedding(model_dir: Path) -> EmbeddingModel | str:
    """How the model makes embeddings, or why it makes none."""
    try:
        return read_embedding_model(model_dir)
    except NoEmbeddingsError as error:
        return str(error)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises UserError where the address is taken or not ours."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # localhost is both ::1 and 127.0.0.1; clients that do not say which mean the latter
        family, kind, protocol, _, address = min(places, key=lambda place: place[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another api.port, "
            "or stop what uses it",
            EXIT_ERROR,
        ) from None
    listener.set_inheritable(False)
    return listener


if __name__ == "__main__":
    sys.exit(main())
