"""Brings a config's whole ring up on this machine, and down again whatever happens. Main thread only."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from cluster.config import ClusterConfig, load_config
from cluster.config_read import read_document
from cluster.errors import EXIT_USAGE, UserError
from deploy.client import Client
from deploy.local_ring import LocalRing, free_ports, is_free, why_not_free
from deploy.state_line import StateLine
from deploy.target import client_for

READY_LIMIT_S = 180.0
STOP_LIMIT_S = 10.0
POLL_S = 0.1
INTERRUPTS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True, slots=True)
class Running:
    """A ring that serves."""

    config: ClusterConfig
    processes: LocalRing
    client: Client


@contextlib.contextmanager
def running(
    path: Path,
    out: TextIO,
    *,
    keeps_ports: bool = False,
    limit_s: float | None = READY_LIMIT_S,
    on_start: Callable[[ClusterConfig], object] = lambda _config: None,
) -> Iterator[Running]:
    """A ring of all the config's nodes, until the block ends; says on `out` what it does.

    `on_start` is called once the processes are there, before anything is loaded. Taken ports are replaced, or
    with `keeps_ports` refused. Raises UserError for a config of other machines, a node that ends, a ring that
    is not ready within `limit_s`, one that does not stop by itself; SIGTERM and SIGHUP act as Ctrl-C does.
    """
    for name in INTERRUPTS:
        signal.signal(getattr(signal, name), _interrupt)
    with tempfile.TemporaryDirectory(prefix="macrame-") as folder:
        if keeps_ports:
            refuse_taken_ports(load_config(path))
        own_path = path if keeps_ports else with_free_ports(path, Path(folder), out)
        config = load_config(own_path)
        if not config.is_loopback:
            raise UserError(f"{path} names other machines, and this command runs all nodes on this one")
        ranks = [node.rank for node in config.nodes if node.use]
        ring = LocalRing(own_path, ranks, Path(folder))
        client = client_for(config)
        with _stopping(ring, out):
            nodes = "one node" if len(ranks) == 1 else f"{len(ranks)} nodes"
            print(f"Starting {nodes} on this machine ...", file=out, flush=True)
            ring.start()
            on_start(config)
            wait_until_ok(ring, client, StateLine(out), limit_s)
            yield Running(config, ring, client)


def may_start(config: ClusterConfig) -> bool:
    """Whether all of the config's nodes are this machine's, and no ring runs there now."""
    head = config.nodes[0]
    return config.is_loopback and is_free(head.host, head.port)


def with_free_ports(path: Path, folder: Path, out: TextIO) -> Path:
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
        print(f"Port {port} is taken here: using {other} in its place.", file=out, flush=True)
        place["port"] = other
    local = config.model_dir_base / config.model
    if local.is_dir():
        document["model"] = str(local)
    copy = folder / "cluster.json"
    copy.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return copy


def refuse_taken_ports(config: ClusterConfig) -> None:
    """Raises UserError for the first address of the config on which no server can listen here."""
    wanted = [(f"nodes[{node.rank}]", node.host, node.port) for node in config.nodes if node.use]
    for key, host, port in [("api", config.api.host, config.api.port), *wanted]:
        error = why_not_free(host, port) if port else None
        if error is not None:
            raise _no_place(key, host, port, error)


def _no_place(key: str, host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port {port} ({key}.port) is taken here: stop what uses it, such as another ring, or give "
            "another port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(
            f"port {port} ({key}.port) is kept for the system's own servers: give one from 1024 on",
            EXIT_USAGE,
        )
    return UserError(
        f"nothing can listen at {host} ({key}.host) on this machine ({error.strerror}): give an address that "
        "it has, such as 127.0.0.1",
        EXIT_USAGE,
    )


def wait_until_ok(
    ring: LocalRing, client: Client, line: StateLine, limit_s: float | None = READY_LIMIT_S
) -> None:
    """Shows what the ring does until /health is ok. Raises UserError if a node ends or time is up."""
    deadline = time.monotonic() + (math.inf if limit_s is None else limit_s)
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
            raise UserError(f"the ring was not ready after {limit_s:.0f} s: {why}\n{logs}")
        line.show(f"{health['status']}: {health.get('reason', '')}")
        time.sleep(POLL_S)


@contextlib.contextmanager
def _stopping(ring: LocalRing, out: TextIO) -> Iterator[None]:
    """Stops the ring however the block ends, and says how that went. Raises UserError for a left-over."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted: stopping the nodes ...", file=out, flush=True)
        raise
    finally:
        for name in INTERRUPTS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # nothing may cut the stop short
        begin = time.monotonic()
        left = ring.stop(STOP_LIMIT_S)
        if left:
            told = "\n".join(left)
            print(f"These did not stop within {STOP_LIMIT_S:.0f} s and were killed:\n{told}", file=out)
        else:
            print(f"All nodes stopped in {time.monotonic() - begin:.1f} s.", file=out, flush=True)
    if left:
        raise UserError("the ring did its work, but did not stop by itself")


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
