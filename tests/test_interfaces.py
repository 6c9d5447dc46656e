"""Kinds of interfaces on Linux from a tree like that of the kernel, and this machine's own ones."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import psutil
import pytest

from cluster import interfaces
from cluster.interfaces import (
    Interface,
    interface_to,
    is_attached,
    linux_kind,
    local_ip,
    read_interfaces,
    worse,
)


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """lo, a card, a Thunderbolt link, Wi-Fi, a bridge with a card, one with a container, a VLAN, a tunnel."""

    def add(name: str, *, kind: str = "1", driver: str = "", below: tuple[str, ...] = ()) -> Path:
        entry = tmp_path / name
        entry.mkdir()
        (entry / "type").write_text(f"{kind}\n")
        if driver:
            (tmp_path / ".drivers" / driver).mkdir(parents=True, exist_ok=True)
            (entry / "device").mkdir()
            (entry / "device" / "driver").symlink_to(tmp_path / ".drivers" / driver)
        for lower in below:
            (entry / f"lower_{lower}").symlink_to(tmp_path / lower)
        return entry

    add("lo", kind="772")
    add("eth0", driver="r8169")
    add("thunderbolt0", driver="thunderbolt-net")
    (add("wlan0", driver="iwlwifi") / "wireless").mkdir()
    add("veth1")
    add("br0", below=("eth0", "veth1"))
    add("docker0", below=("veth1",))
    add("eth0.5", below=("eth0",))
    add("tun0", kind="65534")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lo", "loopback"),
        ("eth0", "ethernet"),
        ("thunderbolt0", "thunderbolt"),
        ("wlan0", "wifi"),
        ("veth1", "virtual"),
        ("br0", "ethernet"),
        ("docker0", "virtual"),
        ("eth0.5", "ethernet"),
        ("tun0", "virtual"),
        ("gone0", "unknown"),
    ],
)
def test_the_kernel_tells_the_kind(sysfs: Path, name: str, kind: str) -> None:
    assert linux_kind(name, sysfs) == kind


def test_a_way_is_of_the_less_wanted_kind_of_its_ends() -> None:
    assert worse("ethernet", "wifi") == worse("wifi", "thunderbolt") == "wifi"
    assert worse("thunderbolt", "") == "thunderbolt"
    assert worse("", "") == "unknown"


def test_loopback_leads_to_loopback_and_to_this_machines_own_addresses() -> None:
    own = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    assert own
    for ip in own:
        found, source = interface_to(ip, 9)
        assert found is not None
        assert found.kind == "loopback"
        assert source == ip


def test_loopback_is_read_with_its_network() -> None:
    loopback = next(i for i in read_interfaces() if i.kind == "loopback")
    assert ipaddress.ip_interface("127.0.0.1/8") in loopback.addresses
    assert loopback.mtu > 0


def test_an_address_without_a_way_has_no_interface() -> None:
    assert local_ip("no address", 9) is None
    assert interface_to("no address", 9) == (None, None)


def test_attached_is_what_lies_in_a_network_of_an_interface() -> None:
    mine = (Interface("bridge0", "thunderbolt", addresses=(ipaddress.ip_interface("169.254.7.1/16"),)),)
    assert is_attached("169.254.200.3", mine)
    assert not is_attached("10.0.0.1", mine)
    assert not is_attached("fd00::1", mine)


@pytest.mark.parametrize(
    ("address", "netmask", "parsed"),
    [
        ("10.1.2.3", "255.255.0.0", "10.1.2.3/16"),
        ("fd00::2", "ffff:ffff:ffff:ffff::", "fd00::2/64"),
        ("fe80::1%en0", "ffff:ffff:ffff:ffff::", "fe80::1/64"),
        ("10.1.2.3", None, "10.1.2.3/32"),
    ],
)
def test_netmasks_become_prefixes(address: str, netmask: str | None, parsed: str) -> None:
    assert interfaces._parse(address, netmask) == ipaddress.ip_interface(parsed)


def test_what_is_no_address_is_left_out() -> None:
    assert interfaces._parse("nonsense", None) is None


def test_a_command_that_is_missing_or_fails_says_nothing() -> None:
    assert interfaces._output("/nonexistent/networksetup") == ""
    assert interfaces._output("false") == ""
