"""This machine's network interfaces: kind, MTU, speed and addresses, and which one leads to an address.

Reads the system; any thread may call it, but on macOS it runs a command, so none that must be quick.
"""

from __future__ import annotations

import ipaddress
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.mac_interfaces import LIST_PORTS, bridge_members, hardware_ports, mac_kind

# What an edge prefers, best first. virtual: bridges, tunnels and other software; unknown: the system tells
# nothing.
KINDS = ("loopback", "thunderbolt", "ethernet", "unknown", "wifi", "virtual")
KIND_WORDS = {
    "loopback": "loopback",
    "thunderbolt": "Thunderbolt",
    "ethernet": "Ethernet",
    "unknown": "unknown kind",
    "wifi": "Wi-Fi",
    "virtual": "virtual",
}
READ_AGAIN_S = 5.0
COMMAND_TIMEOUT_S = 5.0
_SYSFS = Path("/sys/class/net")
_ARPHRD_LOOPBACK = "772"  # include/uapi/linux/if_arp.h
_MAX_STACK = 4  # a VLAN on a bond on cards

IpInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface that is up. mtu and speed are 0 where the system does not know them."""

    name: str
    kind: str  # one of KINDS
    mtu: int = 0  # bytes
    speed_mbit_s: int = 0
    addresses: tuple[IpInterface, ...] = ()  # with their networks


def worse(a: str, b: str) -> str:
    """The less wanted of two kinds, which is what a way over both is; an empty one says nothing."""
    return max((kind for kind in (a, b) if kind), key=KINDS.index, default="unknown")


def read_interfaces() -> tuple[Interface, ...]:
    """The interfaces as they were READ_AGAIN_S ago at most; cables come and go."""
    return _cache.get()


def local_ip(ip: str, port: int) -> str | None:
    """The own address from which this machine reaches `ip`, by its routing table; None: there is no way.

    Sends nothing: connecting a datagram socket only asks for the route.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            ip, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind, protocol) as asking:
            asking.connect(place)
            return plain_ip(asking.getsockname()[0])
    except (OSError, UnicodeError):
        return None


def interface_to(ip: str, port: int) -> tuple[Interface | None, str | None]:
    """The interface by which this machine reaches `ip`, and its own address there; None where unknown.

    An address of this machine itself is reached by loopback, whatever interface has it.
    """
    source = local_ip(ip, port)
    if source is None:
        return None, None
    interfaces = read_interfaces()
    if source == plain_ip(ip):
        loopback = next((i for i in interfaces if i.kind == "loopback"), None)
        return loopback or Interface("", "loopback"), source
    return next((i for i in interfaces if any(str(a.ip) == source for a in i.addresses)), None), source


def is_attached(ip: str, interfaces: tuple[Interface, ...]) -> bool:
    """Whether the address lies in a network that this machine is part of, without a router between."""
    wanted = ipaddress.ip_address(plain_ip(ip))
    return any(wanted in a.network for i in interfaces for a in i.addresses if a.version == wanted.version)


def plain_ip(ip: str) -> str:
    """The address without an IPv6 scope."""
    return ip.partition("%")[0]


class _Cache:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_at = -READ_AGAIN_S
        self._interfaces: tuple[Interface, ...] = ()

    def get(self) -> tuple[Interface, ...]:
        with self._lock:
            if time.monotonic() - self._read_at >= READ_AGAIN_S:
                self._interfaces = _read()
                self._read_at = time.monotonic()
            return self._interfaces


_cache = _Cache()


def _read() -> tuple[Interface, ...]:
    addresses, stats = psutil.net_if_addrs(), psutil.net_if_stats()
    ports = hardware_ports(_output(*LIST_PORTS)) if sys.platform == "darwin" else {}
    found = []
    for name, entries in addresses.items():
        state = stats.get(name)
        if state is None or not state.isup:
            continue
        parsed = (
            _parse(e.address, e.netmask) for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)
        )
        if sys.platform == "darwin":
            is_bridge = name.startswith("bridge") and name not in ports
            members = bridge_members(_output("ifconfig", name)) if is_bridge else ()
            kind = mac_kind(name, ports, members)
        else:
            kind = linux_kind(name)
        speed = 0 if kind in ("virtual", "loopback") else max(0, state.speed)
        found.append(Interface(name, kind, state.mtu, speed, tuple(a for a in parsed if a is not None)))
    return tuple(found)


def linux_kind(name: str, sysfs: Path = _SYSFS, depth: int = 0) -> str:
    """The kind of an interface by /sys/class/net (Documentation/ABI/testing/sysfs-class-net).

    Software on top of hardware, such as a bridge with a card in it, is of the hardware's kind.
    """
    entry = sysfs / name
    if not entry.exists():
        return "loopback" if name == "lo" else "unknown"
    if _text(entry / "type") == _ARPHRD_LOOPBACK:
        return "loopback"
    if (entry / "wireless").exists() or (entry / "phy80211").exists():
        return "wifi"
    if (entry / "device").exists():
        driver = (entry / "device" / "driver").resolve().name
        return "thunderbolt" if driver.startswith("thunderbolt") else "ethernet"
    below = [path.name.removeprefix("lower_") for path in entry.glob("lower_*")] if depth < _MAX_STACK else []
    kinds = {linux_kind(lower, sysfs, depth + 1) for lower in below} - {"virtual"}
    return max(kinds, key=KINDS.index) if kinds else "virtual"


def _parse(address: str, netmask: str | None) -> IpInterface | None:
    try:
        ip = ipaddress.ip_address(plain_ip(address))
        bits = int(ipaddress.ip_address(plain_ip(netmask))).bit_count() if netmask else ip.max_prefixlen
        return ipaddress.ip_interface(f"{ip}/{bits}")
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a command printed; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
