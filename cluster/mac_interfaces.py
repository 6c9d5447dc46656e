"""What macOS says of its network interfaces, in words of ours. Pure: texts of its commands in, values out.

Formats: `networksetup -listallhardwareports` (networksetup(8)) lists a port's name, device and address;
`ifconfig bridge0` (ifconfig(8), bridge parameters) has a `member:` line for each interface of a bridge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LIST_PORTS = ("networksetup", "-listallhardwareports")
# Tunnels, AirDrop and virtual machines; they have no hardware port.
_VIRTUAL = re.compile(r"(utun|awdl|llw|ap|anpi|gif|stf|vmnet|vmenet|feth|ipsec|ppp)\d+$")


def hardware_ports(text: str) -> dict[str, str]:
    """The name of each device's hardware port: {"en0": "Wi-Fi", "bridge0": "Thunderbolt Bridge"}."""
    found = re.findall(r"^Hardware Port: (.*)\nDevice: (\S+)$", text, flags=re.MULTILINE)
    return {device: name.strip() for name, device in found}


def bridge_members(text: str) -> tuple[str, ...]:
    """The devices that a bridge joins, from what ifconfig prints of it."""
    return tuple(re.findall(r"^\s+member: (\S+) ", text, flags=re.MULTILINE))


def port_kind(name: str) -> str:
    """The kind of a hardware port by its name; "unknown" for one that says nothing."""
    lowered = name.lower()
    if "wi-fi" in lowered or "airport" in lowered:
        return "wifi"
    if "ethernet" in lowered or re.search(r"\blan\b", lowered):  # a "Thunderbolt Ethernet" adapter too
        return "ethernet"
    return "thunderbolt" if lowered.startswith("thunderbolt") else "unknown"


def mac_kind(device: str, ports: Mapping[str, str], members: tuple[str, ...] = ()) -> str:
    """The kind of a device: by its port, else by what it bridges, else by its name."""
    if device.startswith("lo"):
        return "loopback"
    if device in ports:
        return port_kind(ports[device])
    if members:
        kinds = {mac_kind(member, ports) for member in members}
        return kinds.pop() if len(kinds) == 1 else "unknown"
    return "virtual" if _VIRTUAL.match(device) else "unknown"
