"""`macrame up --ssh`: a node on this machine and one behind a real sshd with a home of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.errors import UserError
from deploy.up_record import cluster_folder
from deploy.up_remote import There
from deploy.wheel import own_wheel, wheel_version
from tests.ssh_host import SshHost, ssh_host
from tests.up_process import down, left_over, own_address, up, write_config
from tests.waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[SshHost]:
    """A machine on which our wheel's environment is there already: it is the one that runs this test."""
    wheel = own_wheel(tmp_path)
    folder = tmp_path / "box"
    folder.mkdir()
    with ssh_host(folder) as found:
        environment = found.home / ".macrame" / "env" / wheel_version(wheel).partition("+")[2]
        python = environment / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (environment / "complete").write_text("")
        yield found


def arguments(host: SshHost, name: str = "b") -> list[str]:
    return ["--ssh", "--ssh-to", f"{name}=box", "--ssh-config", str(host.client_config)]


def rings(host: SshHost) -> Path:
    return host.home / ".macrame" / "rings"


def test_a_remote_node_is_started_kept_and_stopped(tmp_path: Path, host: SshHost) -> None:
    config = write_config(tmp_path)
    with up(config, *arguments(host)) as ring:
        ring.wait("ready")
        assert [e["text"] for e in ring.events if e["event"] == "started" and e["rank"] == 1] == [
            "b started on box."
        ]
        (there,) = left_over(rings(host))
        assert "--rank 1" in there
        files = {p.name: p.stat().st_mode & 0o077 for p in rings(host).glob("*/rank-1/cluster.json")}
        assert files == {"cluster.json": 0}
        ring.process.kill()
        ring.process.wait()
        with up(config, "--detach", *arguments(host)) as second:
            second.wait("ready")
            assert second.kinds().count("adopted") == 2
            assert second.finish() == 0
        # the block above has stopped them
    assert not left_over(rings(host)) + left_over(cluster_folder(config))


def test_a_remote_head_is_reached_through_ssh_and_followed_over_a_lost_connection(
    tmp_path: Path, host: SshHost
) -> None:
    config = write_config(tmp_path)
    with up(config, *arguments(host, "a")) as ring:
        ready = ring.wait("ready")
        assert ready["on"] == "box"
        assert ready["text"].endswith(" (through ssh)")
        host.client_config.rename(tmp_path / "kept")
        host.client_config.write_text("Host box\n  HostName 127.0.0.1\n  Port 1\n")
        for session in psutil.Process(host.server.pid).children():
            session.kill()
        ring.wait("away")
        (tmp_path / "kept").rename(host.client_config)
        ring.wait("back")
        ring.process.send_signal(signal.SIGINT)
        assert ring.finish() == 0
        assert ring.kinds()[-1] == "stopped"
    assert not left_over(rings(host)) + left_over(cluster_folder(config))


def test_a_remote_node_that_dies_is_started_again(tmp_path: Path, host: SshHost) -> None:
    config = write_config(tmp_path)
    with up(config, *arguments(host)) as ring:
        ring.wait("ready")
        (record,) = rings(host).glob("*/rank-1/started.json")
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        assert ring.wait("died", rank=1)["exit_code"] == -9
        ring.wait("restarted", rank=1)
        ring.process.send_signal(signal.SIGTERM)
        assert ring.finish() == 0


def test_an_order_that_fails_there_ends_no_ring_that_serves(tmp_path: Path, host: SshHost) -> None:
    config = write_config(tmp_path)
    (python,) = host.home.glob(".macrame/env/*/bin/python")
    content = python.read_text()
    with up(config, *arguments(host)) as ring:
        ring.wait("ready")
        before = left_over(rings(host))
        python.write_text("#!/bin/sh\nkill -9 $$\n")  # as where memory is short
        assert "macrame on box does not run" in ring.wait("away")["text"]
        python.write_text(content)
        ring.wait("back")
        ring.wait("state", rank=1, state="ready")
        assert left_over(rings(host)) == before, "its node went on"
        ring.process.send_signal(signal.SIGTERM)
        assert ring.finish() == 0


def test_a_node_that_moved_is_stopped_where_it_was(tmp_path: Path, host: SshHost) -> None:
    config = write_config(tmp_path)
    with up(config, "--detach", *arguments(host)) as ring:
        ring.wait("ready")
        assert len(left_over(rings(host))) == 1
        with up(config, "--detach") as second:
            second.wait("removed", rank=1)
            second.wait("ready")
        assert not left_over(rings(host))
        assert not list(rings(host).glob("*/rank-1/cluster.json"))


def test_down_tells_which_machine_does_not_answer_and_finds_its_node_later(
    tmp_path: Path, host: SshHost
) -> None:
    config = write_config(tmp_path)
    with up(config, "--detach", *arguments(host)) as ring:
        ring.wait("ready")
        ring.finish()
        host.client_config.rename(tmp_path / "away")
        host.client_config.write_text("Host box\n  HostName 127.0.0.1\n  Port 1\n")
        told = down(config)
        assert told["code"] == 4
        assert [(n["name"], n["is_unreachable"]) for n in told["nodes"]] == [("a", False), ("b", True)]
        assert "box" in told["nodes"][1]["left"]
        (tmp_path / "away").rename(host.client_config)
        told = down(config)
        assert [(n["name"], n["was_running"]) for n in told["nodes"]] == [("b", True)]
        assert told["code"] == 0
    wait_for(lambda: not left_over(rings(host)))


def test_a_host_that_does_not_answer_starts_nothing(tmp_path: Path, host: SshHost) -> None:
    config = write_config(tmp_path)
    host.client_config.write_text("Host box\n  HostName 127.0.0.1\n  Port 1\n")
    with up(config, *arguments(host)) as ring:
        assert ring.finish() == 4
        assert ring.events == []
        assert "macrame up: box" in ring.error()
    assert not left_over(cluster_folder(config))


def test_what_was_made_is_told_though_a_host_does_not_answer(tmp_path: Path, host: SshHost) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address beyond loopback")
    config = write_config(tmp_path, host=address)
    host.client_config.write_text("Host box\n  HostName 127.0.0.1\n  Port 1\n")
    with up(config, *arguments(host)) as ring:
        assert ring.finish() == 4
        assert ring.kinds() == ["certificate", "certificate", "config"]


def test_a_node_that_somebody_started_there_is_named_and_left_alone(tmp_path: Path, host: SshHost) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "cluster.run_node", "--rank", "1", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as node:
        try:
            assert node.stdout is not None
            assert "NODE_READY" in node.stdout.readline()
            with up(config, *arguments(host)) as ring:
                assert ring.finish() == 1
                assert (
                    f"macrame up: b on box (rank 1) is served already by process {node.pid} (" in ring.error()
                )
            assert node.poll() is None
        finally:
            node.terminate()
    assert not left_over(rings(host)) + left_over(cluster_folder(config))


def test_a_model_s_folder_that_is_not_there_is_told(tmp_path: Path, host: SshHost) -> None:
    machine = There(
        "box", cluster="c", wheels=tmp_path / "w", options=host.options, find_links=None, placed=None
    )
    missing = tmp_path / "no model"
    try:
        machine.connect()
        machine.check_folders([tmp_path])
        with pytest.raises(UserError) as caught:
            machine.check_folders([tmp_path, missing])
    finally:
        machine.close()
    assert str(caught.value) == (
        f"{missing} is a folder of this machine, and box has none there: copy it to the same place (rsync -a "
        f"{missing}/ box:{missing}/), or name a hub id in the config"
    )
