"""Where measured speeds are kept, and when they are not used."""

from __future__ import annotations

import json
import logging
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import macos, profile_store
from cluster.probe import seen_machine, this_machine
from cluster.profile_store import Machine, host_id, machine_of, read_speeds, write_speeds
from tests.test_measured_speeds import FOUND

MINI = Machine("h", "Apple M4", 10, 16 << 30, "0.32.4")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_measured_is_read_again() -> None:
    assert read_speeds(MINI) is None
    path = write_speeds(MINI, FOUND, {"rounds": 3})
    assert read_speeds(MINI) == FOUND
    assert json.loads(path.read_text())["details"] == {"rounds": 3}
    newer = replace(FOUND, measured_on="2026-12-01")
    assert write_speeds(MINI, newer, {}) == path
    assert read_speeds(MINI) == newer
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "other",
    [
        replace(MINI, host_id="i"),
        replace(MINI, chip="Apple M4 Pro"),
        replace(MINI, gpu_cores=8),
        replace(MINI, memory_bytes=24 << 30),
        replace(MINI, mlx_version="0.33.0"),
        replace(MINI, profile_version=MINI.profile_version + 1),
    ],
)
def test_speeds_hold_for_one_machine_and_one_version_of_mlx(other: Machine) -> None:
    write_speeds(MINI, FOUND, {})
    assert read_speeds(other) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        ("[" * 100_000, "recursion"),
        ("{}", "machine"),
        ('{"machine": {}}', "it is of another machine"),
        (None, "must be a number above 0"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_and_ignored(
    text: str | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_speeds(MINI, FOUND, {})
    content = json.loads(path.read_text())
    content["speeds"]["flops_ms"] = -1
    path.write_text(json.dumps(content) if text is None else text)
    with caplog.at_level(logging.WARNING):
        assert read_speeds(MINI) is None
    assert why in caplog.text
    assert "run macrame profile again" in caplog.text


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_speeds(MINI, FOUND, {})
    with pytest.raises(TypeError):
        write_speeds(MINI, FOUND, {"not": {1, 2}})
    assert read_speeds(MINI) == FOUND
    assert list(path.parent.iterdir()) == [path]


def test_this_machine_has_the_speeds_that_were_measured_on_it() -> None:
    node = seen_machine()
    assert node.measured is None
    assert this_machine.__wrapped__().speeds.source == "table"  # nothing is measured unasked
    write_speeds(machine_of(node.chip, node.gpu_cores, node.memory_bytes), FOUND, {})
    found = this_machine.__wrapped__()
    assert (found.measured, found.measured_on) == (FOUND.speeds, "2026-11-21")
    assert found.speeds == FOUND.speeds
    assert replace(found, measured=None, measured_on="", available_bytes=node.available_bytes) == node


def test_a_machine_is_known_by_what_its_system_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "id").write_text("0123\n")
    monkeypatch.setattr(profile_store, "MACHINE_ID", tmp_path / "id")
    named = host_id()
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    assert host_id() == named
    monkeypatch.setattr(profile_store, "MACHINE_ID", tmp_path / "none")
    assert host_id() != named
    told = '+-o J773  <class IOPlatformExpertDevice>\n    {\n      "IOPlatformUUID" = "1A2B-3C"\n    }\n'
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "output", lambda _: told)
    on_a_mac = host_id()
    monkeypatch.setattr(macos, "output", lambda _: None)
    assert len({named, on_a_mac, host_id()}) == 3
    assert macos.parse_platform_uuid(told) == "1A2B-3C"
