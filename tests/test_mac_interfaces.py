"""Kinds of interfaces from the texts of macOS' commands, in the form that their manuals and users show."""

from __future__ import annotations

import pytest

from cluster.mac_interfaces import bridge_members, hardware_ports, mac_kind, port_kind

PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 5c:1b:f4:00:00:01

Hardware Port: Ethernet Adapter (en4)
Device: en4
Ethernet Address: 5c:1b:f4:00:00:02

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:1b:f4:00:00:03

Hardware Port: USB 10/100/1000 LAN
Device: en7
Ethernet Address: 00:e0:4c:00:00:04

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 5c:1b:f4:00:00:05

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:1b:f4:00:00:06

Hardware Port: Thunderbolt 2
Device: en3
Ethernet Address: 36:1b:f4:00:00:07

Hardware Port: iPhone USB
Device: en9
Ethernet Address: N/A

VLAN Configurations
===================
"""
BRIDGE = """bridge1: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\toptions=63<RXCSUM,TXCSUM,TSO4,TSO6>
\tether 36:1b:f4:00:00:03
\tConfiguration:
\t\tid 0:0:0:0:0:0 priority 0 hellotime 0 fwddelay 0
\t\tmaxage 0 holdcnt 0 proto stp maxaddr 100 timeout 1200
\t\troot id 0:0:0:0:0:0 priority 0 ifcost 0 port 0
\t\tipfilter disabled flags 0x0
\tmember: en2 flags=3<LEARNING,DISCOVER>
\t        ifmaxaddr 0 port 9 priority 0 path cost 0
\tmember: en3 flags=3<LEARNING,DISCOVER>
\t        ifmaxaddr 0 port 10 priority 0 path cost 0
\tnd6 options=201<PERFORMNUD,DAD>
\tmedia: <unknown type>
\tstatus: active
"""


def test_each_device_has_its_port() -> None:
    ports = hardware_ports(PORTS)
    assert len(ports) == 8
    assert (ports["en1"], ports["bridge0"], ports["en7"]) == (
        "Wi-Fi",
        "Thunderbolt Bridge",
        "USB 10/100/1000 LAN",
    )
    assert hardware_ports("networksetup: command not found") == {}


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("en0", "ethernet"),
        ("en4", "ethernet"),
        ("bridge0", "thunderbolt"),
        ("en7", "ethernet"),
        ("en1", "wifi"),
        ("en2", "thunderbolt"),
        ("en9", "unknown"),
        ("lo0", "loopback"),
        ("utun3", "virtual"),
        ("awdl0", "virtual"),
        ("vmnet8", "virtual"),
        ("en12", "unknown"),
    ],
)
def test_a_device_is_of_its_ports_kind(device: str, kind: str) -> None:
    assert mac_kind(device, hardware_ports(PORTS)) == kind


def test_an_adapter_on_a_thunderbolt_plug_is_ethernet() -> None:
    assert port_kind("Thunderbolt Ethernet Slot 1") == "ethernet"


def test_a_bridge_without_a_port_is_of_its_members_kind() -> None:
    ports = hardware_ports(PORTS)
    assert bridge_members(BRIDGE) == ("en2", "en3")
    assert mac_kind("bridge1", ports, bridge_members(BRIDGE)) == "thunderbolt"
    assert mac_kind("bridge1", ports, ("en0", "en2")) == "unknown"
    assert mac_kind("bridge100", ports, ("vmenet0",)) == "virtual"
