"""Nodes and links of a cluster file: their values, and reading them. Pure; any thread may call it."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass

from cluster.config_read import ConfigError, Table, show

DEFAULT_PORT = 50051
MIN_GBIT_S = 1e-6  # a kilobit a second
MAX_GB = 10**6
NODE_KEYS = (
    *("name", "host", "port", "chip", "gpu_cores", "memory_gb", "max_memory_gb"),
    *("reserve_gb", "layers", "use", "device"),
)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node as the file describes it; None where the file leaves a value open."""

    rank: int  # index in the file's `nodes`
    name: str
    host: str
    port: int = DEFAULT_PORT
    chip: str | None = None
    gpu_cores: int | None = None
    memory_gb: float | None = None
    max_memory_gb: float | None = None
    reserve_gb: float | None = None
    layers: tuple[int, int] | None = None  # [start, stop)
    use: bool = True
    device: str | None = None  # "cpu" or "gpu"; None: the GPU where MLX has one

    @property
    def address(self) -> str:
        """host:port as gRPC takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """A measured or known link between two nodes, by name; None: the planner's default."""

    between: tuple[str, str]
    latency_ms: float | None = None
    bandwidth_gbit_s: float | None = None


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses of IPv4 and IPv6."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_layers(text: str) -> tuple[int, int]:
    """ "0:10" as (0, 10). Raises ValueError with the rule."""
    start, colon, stop = text.partition(":")
    if not colon or not start.strip().isdecimal() or not stop.strip().isdecimal() or int(start) >= int(stop):
        raise ValueError('must be two whole numbers "start:stop" with start below stop, such as "0:10"')
    return int(start), int(stop)


def read_nodes(table: Table) -> tuple[NodeConfig, ...]:
    """The nodes of the file, checked against each other. Raises ConfigError."""
    entries = table.take_tables("nodes", NODE_KEYS)
    if not entries:
        raise table.error("nodes", "must list at least one node")
    hosts = [read_host(entry, "host") for entry in entries]
    times = Counter(hosts)
    nodes = tuple(
        _read_node(rank, entry, host, default_name=host if times[host] == 1 else f"node{rank}")
        for rank, (entry, host) in enumerate(zip(entries, hosts, strict=True))
    )
    names: dict[str, int] = {}
    places: dict[tuple[str, int], int] = {}
    for node in nodes:
        if node.name in names:
            raise ConfigError(
                f"{table.file}: nodes[{names[node.name]}] and nodes[{node.rank}] are both named "
                f"{show(node.name)}: give each node a name of its own"
            )
        place = ("localhost" if is_loopback(node.host) else node.host.lower(), node.port)
        if place in places:
            raise ConfigError(
                f"{table.file}: nodes[{node.rank}] has the host {show(node.host)} and port {node.port} of "
                f"nodes[{places[place]}]: give each node a port of its own"
            )
        names[node.name], places[place] = node.rank, node.rank
    if not any(node.use for node in nodes):
        raise ConfigError(f'{table.file}: every node has "use": false: at least one must be used')
    if not nodes[0].use:
        raise ConfigError(
            f"{table.file}: nodes[0].use = false: rank 0 is the head, without which no ring runs; give it no "
            "layers by the others' `layers` instead, or put another node first"
        )
    return nodes


def _read_node(rank: int, entry: Table, host: str, default_name: str) -> NodeConfig:
    layers_text = entry.take_str("layers")
    try:
        layers = None if layers_text is None else parse_layers(layers_text)
    except ValueError as error:
        raise entry.error("layers", str(error)) from None
    return NodeConfig(
        rank=rank,
        name=entry.take_str("name") or default_name,
        host=host,
        port=entry.take_int("port", 1, 65535) or DEFAULT_PORT,
        chip=entry.take_str("chip"),
        gpu_cores=entry.take_int("gpu_cores", 0, 4096),
        memory_gb=entry.take_number("memory_gb", MAX_GB),
        max_memory_gb=entry.take_number("max_memory_gb", MAX_GB),
        reserve_gb=entry.take_number("reserve_gb", MAX_GB, is_zero_allowed=True),
        layers=layers,
        use=entry.take_bool("use", True),
        device=_read_device(entry),
    )


def _read_device(entry: Table) -> str | None:
    device = entry.take_str("device")
    if device not in (None, "cpu", "gpu"):
        raise entry.error("device", f'is {show(device)}, and must be "cpu" or "gpu"')
    return device


def read_host(table: Table, key: str, default: str | None = None) -> str:
    """A host name or address without a port. Raises ConfigError."""
    host = table.take_str(key) or default
    if host is None:
        raise table.error(key, "must be a host name or an address")
    if any(character in host for character in " /@[]") or (":" in host and not _is_ipv6(host)):
        raise table.error(key, "must be a bare host name or address: the port has a key of its own")
    return host


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def read_links(table: Table, names: set[str]) -> tuple[LinkConfig, ...]:
    """The links of the file, each between two known nodes. Raises ConfigError."""
    links: dict[frozenset[str], LinkConfig] = {}
    for entry in table.take_tables("links", ("between", "latency_ms", "bandwidth_gbit_s")):
        pair = entry.take_list("between")
        if len(pair) != 2 or not all(isinstance(name, str) for name in pair) or pair[0] == pair[1]:
            raise entry.error("between", "must be a list of two different node names")
        for name in pair:
            if name not in names:
                raise entry.error(
                    "between",
                    f"names {show(name)}, which is no node: the nodes are {', '.join(sorted(names))}",
                )
        if frozenset(pair) in links:
            raise entry.error("between", "is a pair that an earlier link has: keep one of the two")
        links[frozenset(pair)] = LinkConfig(
            between=(pair[0], pair[1]),
            latency_ms=entry.take_number("latency_ms", 1e6, is_zero_allowed=True),
            bandwidth_gbit_s=entry.take_number("bandwidth_gbit_s", 1e6, low=MIN_GBIT_S),
        )
    return tuple(links.values())
