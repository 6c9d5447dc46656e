"""The ways from this node to the others: their addresses, what was measured, which one an edge tries first.

Any thread may call. `ways` and `places` ask the system, the name server and the peer: that may take a while.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import grpc

from cluster.config import ClusterConfig, NodeConfig, is_loopback
from cluster.fault import injected_address
from cluster.interfaces import KINDS, interface_to, is_attached, plain_ip, read_interfaces, worse
from cluster.rpc import connect, format_address, split_address
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc

MAX_ADDRESSES = 32  # that a node tells; more are not looked at
ASK_S = 1.0
MAX_NAME_CHARS = 64  # of an interface
TYPICAL_BYTES = 64 << 10  # a frame between a token and a chunk of a prompt: by it ways are compared
NEAR_TIE = 1.1  # a way must be faster by so much to be preferred against the order of kinds


@dataclass(frozen=True, slots=True)
class Way:
    """One address of a peer and how this machine reaches it. Empty or 0: unknown."""

    ip: str
    address: str  # host:port to connect to
    local_ip: str
    interface: str
    peer_interface: str
    kind: str  # of cluster.interfaces.KINDS: the less wanted one of both ends
    mtu: int
    speed_mbit_s: int
    is_named: bool  # the config's host means it


@dataclass(frozen=True, slots=True)
class Place:
    """Where an edge may connect to; interface and kind are empty where they are not known."""

    address: str  # host:port
    interface: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a way does; None where it could not be measured."""

    one_way_ms: float
    bandwidth_gbit_s: float

    @property
    def frame_ms(self) -> float:
        """A typical frame."""
        return self.one_way_ms + TYPICAL_BYTES * 8 / (self.bandwidth_gbit_s * 1e6)


class PeerLinks:
    """What one node knows of its ways to the others. It forgets them when the process ends."""

    def __init__(self, config: ClusterConfig, credentials: Credentials | str | None) -> None:
        self._config, self._credentials = config, credentials
        self._lock = threading.Lock()
        self._told: dict[int, tuple[control_pb2.NodeAddress, ...]] = {}
        self._measured: dict[int, dict[str, Measured | None]] = {}  # by rank and address

    def tell(self, rank: int, addresses: Iterable[control_pb2.NodeAddress]) -> None:
        """What a node told of itself; what is no address is left out."""
        kept = tuple(a for a in list(addresses)[:MAX_ADDRESSES] if _is_usable(a))
        with self._lock:
            self._told[rank] = kept

    def remember(self, rank: int, measured: dict[str, Measured | None]) -> None:
        """What the ways to a node were measured to do; edges opened from now on prefer the fastest."""
        with self._lock:
            self._measured[rank] = dict(measured)

    def ways(self, rank: int) -> list[Way]:
        """The ways to a node in order of preference: by kind, those that the config's host means first.

        An address that a node told counts only where this machine is part of its network: elsewhere it may be
        another machine's. Virtual ones count where there is nothing else. Raises OSError where the config's
        host means nothing here and no told address counts.
        """
        node = self._config.nodes[rank]
        if via := injected_address(rank):
            return [replace(_way(split_address(via)[0], node, None, is_named=True), address=via)]
        if is_loopback(node.host):
            return [_way(ip, node, None, is_named=True) for ip in resolve(node.host)[:1]]
        told = {address.ip: address for address in self._attached(rank)}
        try:
            named = resolve(node.host)
        except OSError:
            if not told:
                raise
            named = []
        named = [ip for ip in named if not _is_link_local(ip)] or named
        ways = [_way(ip, node, told.get(ip), is_named=True) for ip in named]
        more = [_way(ip, node, address, is_named=False) for ip, address in told.items() if ip not in named]
        has_real = any(way.kind != "virtual" for way in (*ways, *more))
        ways += [way for way in more if way.kind != "virtual" or not has_real]
        return sorted(ways, key=lambda way: (KINDS.index(way.kind), not way.is_named))

    def places(self, rank: int) -> list[Place]:
        """Where an edge to this node should connect, best first; the config's host:port is one of them."""
        node = self._config.nodes[rank]
        if via := injected_address(rank):
            return [Place(via, kind="loopback")]
        if not is_loopback(node.host):
            self._ask(rank)
        try:
            told = [] if is_loopback(node.host) else self._attached(rank)
            if len(told) < 2:
                return [self._configured(node, told)]
            ways = self.ways(rank)
        except OSError:
            return [Place(node.address)]
        with self._lock:
            measured = self._measured.get(rank, {})
        places = [Place(way.address, way.interface, way.kind) for way in by_speed(ways, measured)]
        if all(place.address != node.address for place in places):
            places.append(Place(node.address))
        return places

    def _ask(self, rank: int) -> None:
        """Ask a node for its addresses, where the head has not told them: it may have come later than we."""
        with self._lock:
            if rank in self._told:
                return
        node = self._config.nodes[rank]
        with connect(node.address, self._credentials, node.name) as channel:
            try:
                request = control_pb2.ProfileRequest(config_digest=self._config.digest)
                profile = control_pb2_grpc.ControlStub(channel).Profile(request, timeout=ASK_S)
            except grpc.RpcError:
                return  # it is not there yet, or does not answer; the edge will tell why
        self.tell(rank, profile.addresses)

    def _configured(self, node: NodeConfig, told: Sequence[control_pb2.NodeAddress]) -> Place:
        """The config's host:port; described without asking a name server, which may take seconds."""
        if is_loopback(node.host):
            return Place(node.address, kind="loopback")
        ip = node.host if _is_ip(node.host) else told[0].ip if told else None
        if ip is None:
            return Place(node.address)
        way = _way(ip, node, next((a for a in told if a.ip == ip), None), is_named=True)
        return Place(node.address, way.interface, way.kind)

    def _attached(self, rank: int) -> list[control_pb2.NodeAddress]:
        """The told addresses where the node listens and this machine is attached, but no own ones.

        Every machine with Docker has the same 172.17.0.1, and it leads each to itself.
        """
        with self._lock:
            told = self._told.get(rank, ())
        if not told:
            return []
        interfaces = read_interfaces()
        own = {str(address.ip) for interface in interfaces for address in interface.addresses}
        return [a for a in told if a.is_bound and a.ip not in own and is_attached(a.ip, interfaces)]


def by_speed(ways: Sequence[Way], measured: dict[str, Measured | None]) -> list[Way]:
    """Measured ways first, the fastest in front unless one before it is nearly as fast; failed ones last."""
    good = [(way, result) for way in ways if (result := measured.get(way.ip)) is not None]
    if good:
        fastest_ms = min(result.frame_ms for _, result in good)
        best = next(way for way, result in good if result.frame_ms <= fastest_ms * NEAR_TIE)
        rest = sorted((pair for pair in good if pair[0] is not best), key=lambda pair: pair[1].frame_ms)
        ordered = [best, *(way for way, _ in rest)]
    else:
        ordered = []
    failed = [way for way in ways if way.ip in measured and measured[way.ip] is None]
    unknown = [way for way in ways if way.ip not in measured]
    return [*ordered, *unknown, *failed]


def own_addresses(host: str) -> list[control_pb2.NodeAddress]:
    """What a node tells of itself: the addresses of its interfaces, and on which it listens under `host`.

    A node binds every address that its host means on it (cluster/rpc.py). None of loopback, and no IPv6
    link-local ones, which mean nothing without an interface of the other side.
    """
    if is_loopback(host):
        return []
    try:
        bound = {plain_ip(ip) for ip in resolve(host)}
    except OSError:
        bound = set()
    is_everywhere = any(ipaddress.ip_address(ip).is_unspecified for ip in bound)
    told = [
        control_pb2.NodeAddress(
            ip=str(address.ip),
            interface=interface.name,
            kind=interface.kind,
            mtu=interface.mtu,
            speed_mbit_s=interface.speed_mbit_s,
            is_bound=is_everywhere or str(address.ip) in bound,
        )
        for interface in read_interfaces()
        for address in interface.addresses
        if interface.kind != "loopback" and not _is_link_local(str(address.ip))
    ]
    told.sort(key=lambda address: not address.is_bound)
    return told[:MAX_ADDRESSES]


def resolve(host: str) -> list[str]:
    """The addresses that a host name means on this machine, in the system's order. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # a name with an empty or overlong part
        raise OSError(f"{host!r} is no host name") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _way(ip: str, node: NodeConfig, told: control_pb2.NodeAddress | None, *, is_named: bool) -> Way:
    here, source = interface_to(ip, node.port)
    own_kind = "unknown" if here is None else here.kind
    if own_kind == "loopback":
        told = None  # another process of this machine
    sizes = [here.mtu if here else 0, told.mtu if told else 0]
    speeds = [here.speed_mbit_s if here else 0, told.speed_mbit_s if told else 0]
    return Way(
        ip=ip,
        address=format_address(ip, node.port),
        local_ip=source or "",
        interface=here.name if here else "",
        peer_interface=told.interface if told else "",
        kind=worse(own_kind, told.kind if told else ""),
        mtu=min(filter(None, sizes), default=0),
        speed_mbit_s=min(filter(None, speeds), default=0),
        is_named=is_named,
    )


def _is_usable(address: control_pb2.NodeAddress) -> bool:
    if not _is_ip(address.ip) or address.kind not in KINDS:
        return False
    if len(address.interface) > MAX_NAME_CHARS or not address.interface.isprintable():
        return False
    ip = ipaddress.ip_address(address.ip)
    return not (ip.is_loopback or ip.is_unspecified or ip.is_multicast or _is_link_local(address.ip))


def _is_link_local(ip: str) -> bool:
    """IPv6 only: the 169.254/16 of IPv4 is what Thunderbolt links have."""
    address = ipaddress.ip_address(plain_ip(ip))
    return address.version == 6 and address.is_link_local


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
