from __future__ import annotations

import socket
import sys
from pathlib import Path

import psutil
import pytest

from cluster import probe
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


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(probe, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    limit.write_text("max\n")
    assert probe._memory_bytes() == psutil.virtual_memory().total
    limit.write_text("123456789\n")
    assert probe._memory_bytes() == 123456789


def test_commands_that_fail_measure_nothing() -> None:
    assert probe._output(["/nonexistent/command"]) is None
    assert probe._output([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert probe._output([sys.executable, "-c", "print(' x ')"]) == "x"


def test_gpu_cores_come_from_the_system_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        ('{"SPDisplaysDataType": [{"_name": "screen"}, {"sppci_cores": "10"}]}', 10),
        ('{"SPDisplaysDataType": []}', None),
        ("not json", None),
        (None, None),
    ]
    for text, cores in answers:
        monkeypatch.setattr(probe, "_output", lambda command, text=text: text)
        assert probe._apple_gpu_cores() == cores
