"""The unit: systemd's own checker takes it, whatever is in its paths, and it says what it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.service_systemd import (
    node_installation,
    node_unit,
    read_installed,
    read_state,
    removal,
    unit_path,
)
from deploy.units import Found, NodeService
from tests.services import node_service

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def analyze(*words: object) -> str:
    assert ANALYZE is not None
    done = subprocess.run([ANALYZE, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_unit(folder: Path, service: NodeService) -> Path:
    path = folder / unit_path(service.name).name
    path.write_text(node_unit(service))
    return path


def here(folder: Path, **values: object) -> NodeService:
    """One that systemd-analyze finds nothing missing of: programs and users are looked up."""
    return node_service(python=Path("/bin/sh"), config=folder / 'a "b" \\ 100% $x; #y' / "c.json", **values)


@needs_systemd
@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "environment": {"HF_HOME": '/data/"hf" 5% $HOME', "EMPTY": ""},
            "arguments": ("--model", "it's 50% $off; 'now'"),
            "writes": (Path("/srv/a b"), Path("/srv/100%")),
            "binds_privileged_port": True,
            "has_gpu": True,
            "nvidia_modprobe": Path("/bin/true"),
        },
    ],
)
def test_systemd_takes_the_unit(tmp_path: Path, values: dict[str, object]) -> None:
    path = write_unit(tmp_path, here(tmp_path, **values))
    assert str(path) not in analyze("verify", path)  # it complains of a unit by its path


@needs_systemd
def test_systemd_complains_of_a_unit_that_is_wrong(tmp_path: Path) -> None:
    path = write_unit(tmp_path, here(tmp_path))
    path.write_text(path.read_text().replace("Restart=always", "Restart=forever"))
    assert "forever" in analyze("verify", path)


@needs_systemd
def test_the_unit_leaves_little_open(tmp_path: Path) -> None:
    path = write_unit(tmp_path, here(tmp_path))
    told = analyze("security", "--offline=true", "--threshold=30", path)  # 3.0 of 10; more is exit code 1
    assert "Overall exposure level" in told


def value(text: str, key: str) -> str:
    (found,) = (line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}="))
    return found


def test_what_the_unit_runs() -> None:
    service = node_service(arguments=("--model", "a'b"), writes=(Path("/srv/alice/.cache"),))
    text = node_unit(service)
    assert value(text, "ExecStart") == (
        "/opt/macrame/bin/python -m cluster.run_node --rank 1 "
        '--config "/srv/alice/my 100%% $$cluster/c.json" --model "a\'b"'
    )
    assert value(text, "User") == "alice"
    assert value(text, "RequiresMountsFor") == '"/srv/alice/my 100%% $cluster" /srv/alice/.cache'
    assert value(text, "ReadWritePaths") == "/srv/alice/.cache"
    assert value(text, "Restart") == "always"
    assert value(text, "RestartPreventExitStatus") == "2 3"
    assert value(text, "CapabilityBoundingSet") == ""
    assert "Environment=HOME=/srv/alice\n" in text


def test_a_gpu_is_not_hidden() -> None:
    plain, gpu = node_unit(node_service()), node_unit(node_service(has_gpu=True))
    assert value(plain, "PrivateDevices") == "yes"
    assert "PrivateDevices" not in gpu
    assert "ProtectClock" not in gpu  # it would allow the clock's device, and by that forbid all others
    assert value(gpu, "After") == "network-online.target nvidia-persistenced.service"
    with_modprobe = node_unit(node_service(has_gpu=True, nvidia_modprobe=Path("/usr/bin/nvidia-modprobe")))
    assert value(with_modprobe, "ExecStartPre") == "+-/usr/bin/nvidia-modprobe -c 0 -u"


def test_a_port_below_1024_gets_its_capability() -> None:
    text = node_unit(node_service(binds_privileged_port=True))
    assert (
        value(text, "AmbientCapabilities") == value(text, "CapabilityBoundingSet") == "CAP_NET_BIND_SERVICE"
    )


def test_what_is_run() -> None:
    plan = node_installation(node_service(writes=(Path("/srv/alice/.cache"),)))
    unit = "macrame-node1.service"
    assert [command.words[1:] for command in plan.start] == [
        ("daemon-reload",),
        ("enable", unit),
        ("restart", unit),
    ]
    assert [(folder.path, folder.account) for folder in plan.folders] == [
        (Path("/srv/alice/.cache"), node_service().account)
    ]
    gone = removal("node1")
    assert [command.words[1:] for command in (*gone.stop, *gone.after)] == [
        ("disable", "--now", unit),
        ("daemon-reload",),
        ("reset-failed", unit),
    ]
    assert gone.files == (unit_path("node1"),)


def test_a_unit_says_what_it_is() -> None:
    service, path = node_service(), unit_path("node1")
    found = read_installed(path, node_unit(service).encode())
    assert found == Found("node1", path, 1, str(service.config), "alice")
    assert read_installed(path, b"[Service]\nExecStart=/bin/true\n") is None
    assert read_installed(path, b"\xff") is None


def test_what_systemctl_says() -> None:
    told = (
        "MainPID=312\nNRestarts=2\nExecMainStatus=0\nLoadState=loaded\nActiveState=active\nSubState=running\n"
    )
    state = read_state("node1", 0, told)
    assert (state.word, state.is_well, state.pid, state.num_starts) == ("running", True, 312, 3)
    told = "MainPID=0\nNRestarts=9\nExecMainStatus=3\nLoadState=loaded\nActiveState=failed\nSubState=failed\n"
    state = read_state("node1", 0, told)
    assert (state.word, state.is_well, state.pid, state.last_exit) == ("failed (failed)", False, None, 3)
    assert read_state("node1", 0, "LoadState=not-found\nActiveState=inactive\n").word == "not loaded"
    assert read_state("node1", 1, "").word == "not loaded"
