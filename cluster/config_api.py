"""The part of the cluster file that is about clients: where HTTP listens, who may ask, who waits. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.config_nodes import NodeConfig, is_loopback, read_host
from cluster.config_read import ConfigError, Table

API_KEYS = ("host", "port", "keys_file", "queue", "queue_timeout_s")
# Half of what the clients of OpenAI and Anthropic wait for an answer: they are told why before they give up.
QUEUE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Where rank 0 serves HTTP."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free port
    keys_file: str | None = None
    queue: int = 64  # requests that may wait
    queue_timeout_s: float | None = QUEUE_TIMEOUT_S  # and so long; None: until their clients leave


def read_api(table: Table) -> ApiConfig:
    """What a table with API_KEYS says. Raises ConfigError."""
    port = table.take_int("port", 0, 65535, default=8080)
    queue = table.take_int("queue", 0, 10**6, default=64)
    assert port is not None
    assert queue is not None
    timeout_s = table.take_number("queue_timeout_s", 10**6)
    if "queue_timeout_s" not in table.values:
        timeout_s = QUEUE_TIMEOUT_S
    host, keys_file = read_host(table, "host", "127.0.0.1"), table.take_str("keys_file")
    return ApiConfig(host, port, keys_file, queue, timeout_s)


def check_api_port(path: Path, api: ApiConfig, nodes: tuple[NodeConfig, ...]) -> None:
    """The HTTP process runs beside rank 0 and cannot have the port of a node there."""
    everywhere = api.host in ("0.0.0.0", "::")
    for node in nodes:
        is_one_host = node.host.lower() == api.host.lower() or (
            is_loopback(node.host) and is_loopback(api.host)
        )
        if node.port == api.port and (is_one_host or (everywhere and node.rank == 0)):
            raise ConfigError(
                f"{path}: api.port = {api.port} is the port of nodes[{node.rank}] on the same machine: "
                "give the HTTP API a port of its own"
            )
