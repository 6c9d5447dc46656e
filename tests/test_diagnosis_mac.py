"""What `macrame doctor` finds on a Mac, from samples of its commands (tests/mac_doctor_samples.py)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import diagnosis_memory
from cluster.config import NodeConfig, load_config
from cluster.diagnosis import Finding, Subject
from cluster.diagnosis_clock import clock
from cluster.diagnosis_firewall import SOCKETFILTERFW, firewall
from cluster.diagnosis_memory import memory
from cluster.diagnosis_reach import why_not
from cluster.diagnosis_sleep import sleep
from cluster.diagnosis_software import python
from planner.node_profile import GB, make_node
from tests import mac_doctor_samples as samples

PROGRAM = os.path.realpath(sys.executable)


def mac(answers: Mapping[tuple[str, ...], str], config: Path | None = None) -> Subject:
    """A Mac on which only these commands answer."""
    found = None if config is None else load_config(config)
    return Subject(
        found, (0,) if found else (), platform="darwin", output=lambda command: answers.get(tuple(command))
    )


def only(findings: list[Finding]) -> Finding:
    """The one that is wrong."""
    (wrong,) = [finding for finding in findings if finding.is_wrong]
    return wrong


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"model": "x/y", "nodes": [{"host": "mini1.local"}, {"host": "mini2.local"}]}))
    return path


def test_a_mac_that_sleeps_is_told_how_not_to() -> None:
    wrong = only(list(sleep(mac({("pmset", "-g"): samples.SLEEPS}))))
    assert (wrong.status, wrong.what) == ("warning", "this Mac goes to sleep after 1 idle minutes")
    assert wrong.mend.startswith("sudo pmset -c sleep 0 ")
    assert "caffeinate -i -s" in wrong.mend
    assert only(list(sleep(mac({("pmset", "-g"): samples.SLEEPS_WITHOUT_SCREEN})))) == wrong


def test_a_mac_that_is_kept_awake_is_fine() -> None:
    (held,) = sleep(mac({("pmset", "-g"): samples.HELD}))
    assert (held.status, held.what) == ("fine", "held off by caffeinate, else after 1 idle minutes")
    (never,) = sleep(mac({("pmset", "-g"): samples.NEVER, ("pmset", "-g", "batt"): samples.ON_MAINS}))
    assert (never.status, never.what) == ("fine", "nothing puts this machine to sleep when it is idle")


def test_low_power_mode_and_a_battery() -> None:
    found = list(
        sleep(mac({("pmset", "-g"): samples.LOW_POWER, ("pmset", "-g", "batt"): samples.ON_BATTERY}))
    )
    assert [finding.what for finding in found] == [
        "Low Power Mode is on",
        "this machine runs on battery",
    ]
    assert found[0].mend == "sudo pmset -a lowpowermode 0"


def test_a_mac_without_an_answer_is_not_called_fine() -> None:
    (unknown,) = sleep(mac({}))
    assert (unknown.status, unknown.what) == ("skipped", "pmset -g does not answer")
    (unknown,) = clock(mac({}))
    assert unknown.status == "skipped"


@pytest.mark.parametrize("text", samples.BLOCK_ALL_ON)
def test_a_firewall_that_blocks_everything(config: Path, text: str) -> None:
    states = {
        (SOCKETFILTERFW, "--getglobalstate"): samples.FIREWALL_ON,
        (SOCKETFILTERFW, "--getblockall"): text,
    }
    wrong = only(list(firewall(mac(states, config))))
    assert (wrong.status, wrong.what) == ("error", "macOS's firewall blocks all incoming connections")
    assert wrong.mend == f"sudo {SOCKETFILTERFW} --setblockall off"
    states = {(SOCKETFILTERFW, "--getglobalstate"): samples.FIREWALL_BLOCKS_ALL}
    assert only(list(firewall(mac(states, config)))) == wrong


@pytest.mark.parametrize("text", samples.BLOCK_ALL_OFF)
def test_a_firewall_that_blocks_this_python(config: Path, text: str) -> None:
    states = {
        (SOCKETFILTERFW, "--getglobalstate"): samples.FIREWALL_ON,
        (SOCKETFILTERFW, "--getblockall"): text,
        (SOCKETFILTERFW, "--getappblocked", PROGRAM): samples.APP_BLOCKED,
    }
    wrong = only(list(firewall(mac(states, config))))
    assert wrong.what == f"macOS's firewall blocks incoming connections to {PROGRAM}"
    assert wrong.mend.endswith(f"--unblockapp {PROGRAM}")
    for answer in (samples.APP_ALLOWED, samples.APP_UNKNOWN):
        (good,) = firewall(mac({**states, (SOCKETFILTERFW, "--getappblocked", PROGRAM): answer}, config))
        assert (good.status, good.what) == ("fine", f"macOS's firewall is on, and does not block {PROGRAM}")


def test_a_firewall_that_is_off_or_silent(config: Path) -> None:
    (off,) = firewall(mac({(SOCKETFILTERFW, "--getglobalstate"): samples.FIREWALL_OFF}, config))
    assert (off.status, off.what) == ("fine", "macOS's firewall is off")
    (unknown,) = firewall(mac({(SOCKETFILTERFW, "--getglobalstate"): samples.FIREWALL_ON}, config))
    assert unknown.status == "skipped"
    assert unknown.what.endswith(f"does not tell whether it blocks {PROGRAM}")
    (silent,) = firewall(mac({}, config))
    assert (silent.status, silent.what) == ("skipped", f"{SOCKETFILTERFW} does not tell its state")


def test_no_route_to_host_is_explained_as_a_privacy_setting() -> None:
    node = NodeConfig(1, "mini2", "mini2.local")
    finding = why_not(node, OSError(65, "No route to host"), is_mac=True)
    assert finding.what == "mini2 at mini2.local:50051 cannot be reached: No route to host (errno 65)"
    for word in ("LaunchAgents", "Terminal", "LaunchDaemons", "local network"):
        assert word in finding.why
    assert "Privacy_LocalNetwork" in finding.mend
    assert "macrame service install" in finding.mend
    elsewhere = why_not(node, OSError(113, "No route to host"), is_mac=False)
    assert "local network" not in elsewhere.why
    assert elsewhere.mend.startswith("ip route get mini2.local")


def test_a_translated_python() -> None:
    wrong = only(list(python(mac({("sysctl", "-n", "sysctl.proc_translated"): "1"}))))
    assert wrong.what.endswith("is built for Intel and runs translated (Rosetta)")
    (good,) = python(mac({("sysctl", "-n", "sysctl.proc_translated"): "0"}))
    assert good.status == "fine"


@pytest.mark.parametrize(
    ("told", "status", "what"),
    [
        ("0", "fine", "macOS's own: 45.8 GB (67% of memory)"),
        ("57344", "fine", "raised to 60.1 GB until the next start of this Mac"),
        ("65000", "warning", "iogpu.wired_limit_mb = 65000 lets the GPU wire 99% of memory"),
        (None, "skipped", "this macOS does not tell iogpu.wired_limit_mb"),
    ],
)
def test_the_wired_limit(monkeypatch: pytest.MonkeyPatch, told: str | None, status: str, what: str) -> None:
    machine = make_node(0, "studio", "localhost", memory_bytes=64 << 30, chip="Apple M2 Max")
    machine = replace(machine, ceiling_bytes=int(45.8 * GB), ceiling_source="measured")
    monkeypatch.setattr(diagnosis_memory, "seen_machine", lambda: machine)
    monkeypatch.setattr(diagnosis_memory, "available_bytes", lambda _limit: 32 << 30)
    answers = {} if told is None else {("sysctl", "-n", "iogpu.wired_limit_mb"): told}
    found = {finding.what: finding for finding in memory(mac(answers))}
    assert found[what].status == status
    if status == "warning":
        assert found[what].mend == "sudo sysctl iogpu.wired_limit_mb=58982"


def test_a_mac_whose_clock_is_not_set_by_the_network() -> None:
    wrong = only(list(clock(mac({("systemsetup", "-getusingnetworktime"): "Network Time: Off"}))))
    assert wrong.mend == "sudo sntp -sS time.apple.com"
    (good,) = clock(mac({("systemsetup", "-getusingnetworktime"): "Network Time: On"}))
    assert good.status == "fine"
