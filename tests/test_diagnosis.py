"""Checks of `macrame doctor` on this machine, with faults planted in files, ports and settings."""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import socket
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import diagnosis_checks, diagnosis_disk, diagnosis_memory, diagnosis_sleep, diagnosis_software
from cluster.config import NodeConfig, load_config
from cluster.diagnosis import Finding, Subject, fine, received, skipped
from cluster.diagnosis_checks import diagnose
from cluster.diagnosis_clock import clock
from cluster.diagnosis_disk import disk
from cluster.diagnosis_firewall import firewall
from cluster.diagnosis_links import links, way
from cluster.diagnosis_memory import memory
from cluster.diagnosis_model import model
from cluster.diagnosis_plan import plan
from cluster.diagnosis_ports import ports
from cluster.diagnosis_reach import reach, why_not
from cluster.diagnosis_security import security
from cluster.diagnosis_sleep import sleep
from cluster.diagnosis_software import device, environment, packages, python
from cluster.interfaces import Interface
from tests.node_process import node, write_cluster
from tests.tiny_models import write_checkpoint

LAN = {"host": "192.0.2.9", "memory_gb": 16, "chip": "Apple M4"}  # of a network for documents, RFC 5737


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


def subject(path: Path, *ranks: int, **values: Any) -> Subject:
    return Subject(load_config(path), ranks, **values)


def wrong(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.is_wrong]


def only(findings: Iterable[Finding]) -> Finding:
    """The one that is wrong; it says why it matters and what mends it."""
    (found,) = wrong(findings)
    assert found.why
    assert found.mend
    return found


# -- values -----------------------------------------------------------------------------------------------
def test_a_finding_says_why_and_what_mends_it() -> None:
    with pytest.raises(ValueError, match="does not say why it matters, or what mends it"):
        Finding("disk", "error", "the disk is full")
    with pytest.raises(ValueError, match="'bad' is none of error, warning, fine, skipped"):
        received("disk", "bad", "", "", "")


def test_what_another_node_says_moves_no_cursor() -> None:
    assert received("disk", "fine", "a\x1b[2Jb", "", "").what == "a [2Jb"


def test_a_check_that_fails_itself_is_not_called_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(_subject: Subject) -> Iterable[Finding]:
        raise OSError(errno.EIO, "Input/output error")

    def good(_subject: Subject) -> Iterable[Finding]:
        return [fine("good", "x")]

    monkeypatch.setattr(diagnosis_checks, "CHECKS", (odd, good))
    seen: list[str] = []
    failed = skipped("odd", "the check itself failed: OSError: [Errno 5] Input/output error")
    assert diagnose(Subject(), seen.append) == [failed, fine("good", "x")]
    assert seen == ["odd", "good"]
    assert diagnose(Subject(), without=("odd",)) == [fine("good", "x")]


def test_without_a_config_nothing_is_said_of_a_cluster() -> None:
    for check in (security, ports, firewall, reach, links, model, plan):
        (finding,) = check(Subject())
        assert (finding.status, finding.what) == ("skipped", "needs --config")


def test_a_machine_that_is_not_in_the_config(tmp_path: Path) -> None:
    there = subject(write_cluster(tmp_path, "x/y", LAN))
    for check in (ports, firewall):
        (finding,) = check(there)
        assert finding.what == f"no node of {tmp_path / 'cluster.json'} is on this machine"


# -- software ---------------------------------------------------------------------------------------------
def test_this_environment_is_right() -> None:
    (found,) = python(Subject())
    assert found.status == "fine"
    (found,) = packages(Subject())
    assert found.status == "fine"
    assert "mlx-lm" in found.what


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "grpcio":
            raise PackageNotFoundError(name)
        return "0.29.1" if name == "mlx-lm" else "99.0"

    monkeypatch.setattr(diagnosis_software, "version", version)
    missing, old = wrong(packages(Subject()))
    assert missing.what.startswith("a package is missing: grpcio>=1.")
    assert old.what.startswith("a package is too old: mlx-lm 0.29.1 (needs 0.")
    assert "uv tool install --reinstall ." in old.mend


def test_another_distribution_with_a_package_of_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"proto": ["macrame", "proto-plus"]}
    monkeypatch.setattr(diagnosis_software, "packages_distributions", lambda: owners)
    found = only(packages(Subject()))
    assert found.what == "proto-plus in this environment has a package named 'proto' too"


def test_variables_that_are_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_FAULT", "step_delay_ms=9")
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert [finding.mend for finding in environment(Subject())] == [
        "unset MACRAME_FAULT",
        "unset MLX_DISABLE_COMPILE",
    ]
    monkeypatch.delenv("MACRAME_FAULT")
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "0")
    assert not wrong(environment(Subject()))


def test_mlx_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis_software, "_DEVICE_SCRIPT", "import mlx.core.nothing")
    found = only(device(Subject()))
    assert found.what.startswith("mlx cannot be used: ModuleNotFoundError: No module named")


# -- the machine ------------------------------------------------------------------------------------------
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis_disk, "_try_to_write", lambda _folder: errno.ENOSPC)
    found = wrong(disk(Subject()))
    assert found[0].status == "error"
    assert " is full: " in found[0].what
    assert found[0].mend.startswith("du -xhd 1 ")


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    found = wrong(disk(Subject()))
    assert found[0].what.startswith("/proc/nothing/macrame (caches) cannot be written: ")


def test_a_disk_with_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    little = type(shutil.disk_usage("/"))(200 * 10**9, 199 * 10**9, 10**9)
    monkeypatch.setattr(diagnosis_disk.shutil, "disk_usage", lambda _folder: little)
    found = wrong(disk(Subject()))[0]
    assert (found.status, found.what[:20]) == ("warning", "1.00 GB of 200.0 GB ")


def test_memory_that_the_config_has_and_the_machine_not(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis_memory, "available_bytes", lambda total: total)
    path = write_cluster(tmp_path, tiny, node(memory_gb=4000, max_memory_gb=3000))
    first, second = wrong(memory(subject(path, 0)))
    assert first.what.startswith("nodes[0].memory_gb = 4000, but this machine has ")
    assert second.what.startswith("nodes[0].max_memory_gb = 3000 of 127.0.0.1 is more than the ")


@pytest.mark.parametrize(("share", "status"), [(0.06, "warning"), (0.02, "error")])
def test_memory_that_others_took(monkeypatch: pytest.MonkeyPatch, share: float, status: str) -> None:
    monkeypatch.setattr(diagnosis_memory, "available_bytes", lambda total: int(total * share))
    found = only(memory(Subject()))
    assert found.status == status
    assert found.mend.startswith("end programs that you do not need: ps ")


def test_a_machine_that_suspends_when_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, more = tmp_path / "logind.conf", tmp_path / "logind.conf.d"
    main.write_text("[Login]\n#IdleAction=ignore\n")
    monkeypatch.setattr(diagnosis_sleep, "LOGIND", (main, more))
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    assert not wrong(sleep(Subject()))
    more.mkdir()
    (more / "power.conf").write_text("[Login]\nIdleAction=suspend\n")
    found = only(sleep(Subject()))
    assert found.what == "systemd-logind does 'suspend' when this machine is idle (IdleAction)"


def test_a_clock_that_is_before_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 86400.0)
    found = only(clock(Subject()))
    assert found.what.startswith("the clock says 1970-01-02 00:00 UTC, but macrame was installed here on 20")


@pytest.mark.parametrize(("told", "status"), [("no", "warning"), ("yes", "fine"), (None, "skipped")])
def test_a_clock_that_nobody_sets(told: str | None, status: str) -> None:
    (found,) = clock(Subject(output=lambda _command: told))
    assert found.status == status


# -- the network ------------------------------------------------------------------------------------------
def test_a_port_that_another_program_has(tmp_path: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taker, socket.create_server(("127.0.0.1", 0)) as api:
        node_port, api_port = taker.getsockname()[1], api.getsockname()[1]
        path = write_cluster(tmp_path, tiny, node(port=node_port), api={"port": api_port})
        first, second = wrong(ports(subject(path, 0)))
    name = psutil.Process().name()
    assert first.what == f"127.0.0.1:{node_port} is taken by {name} (process {os.getpid()})"
    assert first.mend.startswith(f"kill {os.getpid()}    # or give ")
    assert second.why == "the HTTP API cannot listen there, and ends at its start"


def test_an_address_that_is_none_of_this_machine(tmp_path: Path) -> None:
    found = only(ports(subject(write_cluster(tmp_path, "x/y", LAN), 0, credentials=None)))
    assert found.what == f"node 192.0.2.9 cannot listen at 192.0.2.9: {os.strerror(errno.EADDRNOTAVAIL)}"


def _firewall(path: Path, answers: dict[str, str]) -> list[Finding]:
    told = subject(path, 0, platform="linux", output=lambda command: answers.get(" ".join(command)))
    return list(firewall(told))


def test_linux_firewalls(tmp_path: Path) -> None:
    path = write_cluster(tmp_path, "x/y", LAN)
    (unknown,) = _firewall(path, {})
    assert unknown.status == "skipped"
    running = {"firewall-cmd --state": "running"}
    found = only(_firewall(path, {**running, "firewall-cmd --list-ports": "22/tcp 50000-50050/tcp"}))
    assert found.what == "firewalld is on and has no rule that lets others in to port 50051"
    assert found.mend == ("sudo firewall-cmd --permanent --add-port=50051/tcp && sudo firewall-cmd --reload")
    assert not wrong(_firewall(path, {**running, "firewall-cmd --list-ports": "50000-50100/tcp"}))
    chain = (
        "table inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\t\t"
    )
    found = only(_firewall(path, {"nft list ruleset": f"{chain}tcp dport 22 accept\n\t}}\n}}"}))
    assert found.what.startswith("nftables drops what comes in")
    assert not wrong(_firewall(path, {"nft list ruleset": f"{chain}tcp dport 50051 accept\n\t}}\n}}"}))
    assert not wrong(_firewall(write_cluster(tmp_path, "x/y", node()), {}))  # loopback alone


def test_names_and_machines_that_do_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = node(name="there", port=listener.getsockname()[1])
        path = write_cluster(tmp_path, "x/y", node(name="me"), there, node(name="resting"))
        assert [(found.status, found.what) for found in reach(subject(path, 0))] == [
            ("fine", "connections to there are accepted"),
            ("fine", "the machine of resting answers; no node listens there now"),
        ]
    nowhere = NodeConfig(1, "mini2", "mini2.local")
    found = why_not(nowhere, socket.gaierror(socket.EAI_NONAME, "Name or service not known"), is_mac=False)
    assert found.what == (
        "the host name of mini2 at mini2.local:50051 means nothing here: Name or service not known"
    )
    assert found.mend.startswith("sudo apt install avahi-daemon")
    assert why_not(nowhere, TimeoutError(), is_mac=False).mend.startswith("ping -c 3 mini2.local")


def test_wifi_where_a_cable_is_connected() -> None:
    wifi = Interface("en0", "wifi")
    cable = Interface("bridge0", "thunderbolt", addresses=(ipaddress.ip_interface("169.254.3.4/16"),))
    found = only([way("mini2", wifi, (wifi, cable), Path("my cluster.json"))])
    assert found.what == "mini2 is reached by Wi-Fi (en0), though Thunderbolt (bridge0) is connected"
    assert found.mend.startswith("macrame links --config 'my cluster.json' ")
    without = Interface("en5", "ethernet")
    assert not way("mini2", wifi, (wifi, without), Path("c")).is_wrong  # no address: no cable
    assert way("mini2", cable, (wifi, cable), Path("c")).what == "mini2 is reached by Thunderbolt (bridge0)"
