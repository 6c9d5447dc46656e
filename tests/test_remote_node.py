"""A node on another machine: a real sshd, a real run_node, handles that come and go."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import EXIT_ERROR, UserError
from deploy.node_handle import NodeHandle, NodeProcess, files_digest
from deploy.remote_home import RemoteHome
from deploy.remote_node import RemoteNode
from deploy.ssh import Ssh
from tests.disks import small_disk
from tests.ring_processes import free_ports
from tests.ssh_host import SshHost, ssh_host
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

pytestmark = pytest.mark.long
VERSION = "0.1.0+abc"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[SshHost]:
    (tmp_path / "host").mkdir()
    with ssh_host(tmp_path / "host") as running:
        yield running


@pytest.fixture
def ssh(host: SshHost) -> Iterator[Ssh]:
    with Ssh("box", options=host.options) as connected:
        yield connected


def node_there(host: SshHost, ssh: Ssh, rank: int = 0, python: str = sys.executable) -> RemoteNode:
    """With this test's own interpreter as the environment there."""
    home = RemoteHome(str(host.home / ".macrame"), python, VERSION, "Linux x86_64")
    return RemoteNode(ssh, home, "my ring", rank)


def files_of(tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    """A cluster of one node with a tiny model, and a certificate that it does not use."""
    model = write_checkpoint("llama", tmp_path / "tiny", num_layers=3)
    port, api = free_ports(2)
    node = {"host": "127.0.0.1", "port": port, "memory_gb": 16}
    document = {"model": str(model), "context": 64, "nodes": [node], "api": {"port": api}}
    return {"cluster.json": (json.dumps(document).encode(), 0o600), "certs/ca.pem": (b"a", 0o644)}


def wait_listening(node: NodeHandle) -> None:
    wait_for(lambda: "NODE_READY" in node.tail() or not node.state().is_running, 60.0)
    assert "NODE_READY" in node.tail(), node.tail()


def test_files_are_copied_where_they_differ(host: SshHost, ssh: Ssh, tmp_path: Path) -> None:
    node = node_there(host, ssh)
    files = files_of(tmp_path)
    assert node.put_files(files)
    assert not node.put_files(files)
    written = Path(node.folder) / "cluster.json"
    assert written.read_bytes() == files["cluster.json"][0]
    assert written.stat().st_mode & 0o777 == 0o600
    written.chmod(0o644)
    assert node.put_files(files)
    assert written.stat().st_mode & 0o777 == 0o600
    assert Path(node.folder).is_relative_to(host.home / ".macrame" / "rings")


def test_a_secret_that_is_no_more_handed_out_is_removed_there(
    host: SshHost, ssh: Ssh, tmp_path: Path
) -> None:
    files = files_of(tmp_path)
    node_there(host, ssh).put_files(files | {"token": (b"secret", 0o600)})
    node = node_there(host, ssh)
    assert (Path(node.folder) / "token").exists()
    assert node.put_files({"cluster.json": files["cluster.json"]})
    assert sorted(p.name for p in Path(node.folder).iterdir()) == ["cluster.json", "files.json"]


def test_who_listens_there_is_told(host: SshHost, ssh: Ssh) -> None:
    (free,) = free_ports(1)
    nobody, somebody = node_there(host, ssh).listeners([("127.0.0.1", free), ("127.0.0.1", host.port)])
    assert nobody is None
    assert somebody is not None
    assert somebody.startswith(f"process {host.server.pid} (sshd")


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "certs/../../outside"])
def test_a_file_outside_of_its_folder_is_refused(host: SshHost, ssh: Ssh, name: str) -> None:
    with pytest.raises(UserError, match=r"is no file within a node's folder"):
        node_there(host, ssh).put_files({name: (b"", 0o600)})


def test_a_node_outlives_its_handle_and_is_found_by_the_next(host: SshHost, ssh: Ssh, tmp_path: Path) -> None:
    files = files_of(tmp_path)
    with Ssh("box", options=host.options) as first:
        node = node_there(host, first)
        assert node.state() == NodeProcess()
        node.put_files(files)
        node.start(["--no-api"], {"MLX_DISABLE_COMPILE": "1"})
        wait_listening(node)
        pid = node.state().pid
    again = node_there(host, ssh)
    state = again.state()
    assert (state.pid, state.version, state.files_digest) == (pid, VERSION, files_digest(files))
    assert state.started_at_s is not None
    assert again.stop() == ""
    assert again.state() == NodeProcess()
    assert again.stop() == ""
    assert not running(pid)


def test_a_node_that_was_killed_leaves_its_signal_and_its_log(
    host: SshHost, ssh: Ssh, tmp_path: Path
) -> None:
    node = node_there(host, ssh)
    node.put_files(files_of(tmp_path))
    node.start(["--no-api"])
    wait_listening(node)
    pid = node.state().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: node.state().exit_code == -signal.SIGKILL, 20.0)
    assert not node.state().is_running
    assert "NODE_READY" in node.tail()
    node.start(["--no-api"])
    assert node.state().exit_code is None
    wait_listening(node)
    assert node.stop() == ""


def test_a_node_that_refuses_its_config_leaves_exit_code_and_sentence(host: SshHost, ssh: Ssh) -> None:
    node = node_there(host, ssh)
    node.put_files({"cluster.json": (b'{"modell": "x"}', 0o600)})
    node.start()
    wait_for(lambda: node.state().exit_code == 3, 20.0)
    assert "modell" in node.tail(1)


def test_a_node_that_does_not_stop_is_killed_and_told(host: SshHost, ssh: Ssh, tmp_path: Path) -> None:
    node = node_there(host, ssh)
    node.put_files(files_of(tmp_path))
    node.start(["--no-api"])
    wait_listening(node)
    pid = node.state().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert "did not end within 1 s and was killed" in node.stop(timeout_s=1.0)
    assert not running(pid)


def test_a_full_disk_under_a_node_is_told_with_the_machine(host: SshHost, ssh: Ssh) -> None:
    with small_disk(host.home / ".macrame"), pytest.raises(UserError) as raised:
        node_there(host, ssh).put_files({"large": (os.urandom(2_000_000), 0o600)})
    assert raised.value.exit_code == EXIT_ERROR
    assert str(raised.value).startswith("the disk of box is full: make room there (/")
    assert str(raised.value).endswith("/large cannot be written: No space left on device)")


def test_what_else_the_agent_cannot_do_is_told_with_the_machine(host: SshHost, ssh: Ssh) -> None:
    node = node_there(host, ssh)
    Path(node.folder).parent.mkdir(parents=True)
    Path(node.folder).write_text("a file in its place")
    with pytest.raises(UserError, match=r"box: .*/rank-0/.* cannot be written: "):
        node.put_files({"cluster.json": (b"{}", 0o600)})


def test_an_environment_that_is_gone_is_told(host: SshHost, ssh: Ssh) -> None:
    with pytest.raises(UserError, match=r"macrame on box does not run \(.*not found.*'macrame up'"):
        node_there(host, ssh, python="/nowhere/python").state()


def running(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True
