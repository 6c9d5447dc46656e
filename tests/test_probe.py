from __future__ import annotations

import socket

import psutil
import pytest

from cluster import probe
from cluster.container_memory import ContainerMemory
from cluster.probe import is_this_machine, this_machine
from planner.node_profile import GB


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_this_machine(host: str) -> None:
    assert is_this_machine(host)


def test_this_machine_has_its_names_and_addresses() -> None:
    name = socket.gethostname()
    assert is_this_machine(name)
    assert is_this_machine(f"{name.partition('.')[0]}.local")
    for addresses in psutil.net_if_addrs().values():
        assert all(is_this_machine(a.address) for a in addresses if a.family == socket.AF_INET)


@pytest.mark.parametrize("host", ["mini1.local", "192.0.2.1", "2001:db8::1"])
def test_other_hosts_are_not(host: str) -> None:
    assert not is_this_machine(host)


def test_this_machine_is_measured_once() -> None:
    node = this_machine()
    assert node is this_machine()
    assert node.chip
    assert GB // 4 < node.ceiling_bytes <= node.memory_bytes <= psutil.virtual_memory().total
    assert node.available_bytes is not None
    assert 0 < node.available_bytes <= node.memory_bytes
    assert node.ceiling_source == "measured"


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    total_bytes = psutil.virtual_memory().total
    for container, memory_bytes, left_bytes in (
        (None, total_bytes, total_bytes),
        (ContainerMemory(2 * total_bytes, 2 * total_bytes), total_bytes, total_bytes),
        (ContainerMemory(123456789, 5), 123456789, 5),
    ):
        monkeypatch.setattr(probe, "container_memory", lambda container=container: container)
        assert probe._memory_bytes() == memory_bytes
        assert 0 < probe.available_bytes(memory_bytes) <= left_bytes
