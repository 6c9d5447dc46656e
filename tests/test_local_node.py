"""A node of this machine: its files, its log, and finding it again. All but one are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import UserError
from deploy.local_node import RECORD_NAME, LocalNode, own_version
from deploy.node_handle import CONFIG_NAME, NodeProcess, files_digest
from tests.waiting import wait_for

FILES = {CONFIG_NAME: (b"{}", 0o600), "token": (b"secret\n", 0o600), "certs/a.pem": (b"1", 0o644)}


@contextmanager
def stand_in(node: LocalNode, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process with the command line of the node, as an earlier `up` would have left it."""
    script = f"import signal, sys\n{code}\nprint('up', flush=True)\nwhile True: signal.pause()"
    command = [
        sys.executable,
        "-c",
        script,
        "-m",
        "cluster.run_node",
        "--config",
        str(node.folder / CONFIG_NAME),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            process.kill()


def record(node: LocalNode, **values: object) -> None:
    node.folder.mkdir(parents=True, exist_ok=True)
    (node.folder / RECORD_NAME).write_text(json.dumps(values))


def test_a_node_that_was_never_started(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-0", 0)
    assert node.state() == NodeProcess()
    assert node.tail() == ""
    assert node.stop() == ""


def test_only_what_differs_is_written_and_secrets_are_private(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-0", 0)
    assert node.put_files(FILES)
    assert not node.put_files(FILES)
    assert (node.folder / "token").stat().st_mode & 0o777 == 0o600
    assert node.folder.stat().st_mode & 0o077 == 0
    (node.folder / "token").chmod(0o644)
    assert node.put_files(FILES)
    assert (node.folder / "token").stat().st_mode & 0o777 == 0o600
    assert node.put_files(FILES | {CONFIG_NAME: (b"{ }", 0o600)})


def test_what_is_no_more_handed_out_is_removed_and_nothing_else(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-0", 0)
    node.put_files(FILES)
    node.log.write_text("said\n")
    again = LocalNode(node.folder, 0)  # of a later `up`
    assert again.put_files({CONFIG_NAME: FILES[CONFIG_NAME]})
    assert sorted(path.name for path in node.folder.iterdir()) == [CONFIG_NAME, "files.json", "node.log"]
    assert not again.put_files({CONFIG_NAME: FILES[CONFIG_NAME]})
    assert again.put_files({})
    assert not (node.folder / CONFIG_NAME).exists()


def test_a_secret_that_cannot_be_removed_is_told(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-0", 0)
    node.put_files(FILES)
    (node.folder / "token").unlink()
    (node.folder / "token").mkdir()
    with pytest.raises(UserError, match=r"rank-0/token cannot be removed: "):
        node.put_files({})


def test_certificates_are_not_in_the_digest_and_all_else_is() -> None:
    assert files_digest(FILES) == files_digest(FILES | {"certs/a.pem": (b"2", 0o644)})
    assert files_digest(FILES) != files_digest(FILES | {"token": (b"other\n", 0o600)})
    assert files_digest(FILES) != files_digest(FILES | {"api_keys": (b"key\n", 0o600)})


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "rank-0").write_text("a file in its place")
    with pytest.raises(UserError, match=r"rank-0/.* cannot be written: "):
        LocalNode(tmp_path / "rank-0", 0).put_files(FILES)


def test_a_running_node_is_found_by_its_record(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-1", 1)
    with stand_in(node) as process:
        record(node, pid=process.pid, started_at_s=5.0, files_digest="d", version="v")
        assert node.state() == NodeProcess(process.pid, 5.0, None, "d", "v")
        assert node.stop() == ""
        assert process.wait() == -signal.SIGTERM
    assert node.state() == NodeProcess()


def test_a_running_node_is_found_without_its_record(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-1", 1)
    with stand_in(node) as process:
        assert node.state() == NodeProcess(pid=process.pid)
        record(node, pid=1, started_at_s=5.0, files_digest="d", version="v")
        assert node.state() == NodeProcess(pid=process.pid)  # what was recorded is of another process


def test_a_number_that_another_process_has_now_is_not_ours(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-1", 1)
    record(node, pid=os.getpid(), started_at_s=5.0, files_digest="d", version="v")
    assert not node.state().is_running
    assert node.stop() == ""


def test_a_node_that_does_not_end_is_killed_and_told(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-1", 1)
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
    with stand_in(node, ignoring) as process:
        record(node, pid=process.pid)
        node.log.write_text("where it hangs\n")
        left = node.stop(timeout_s=0.1)
        process.wait()
    assert left.startswith(f"process {process.pid} (-c ")
    assert "did not end within 0 s and was killed; the end of its log:\nwhere it hangs" in left


def test_a_real_node_that_ends_by_itself(tmp_path: Path) -> None:
    node = LocalNode(tmp_path / "rank-0", 0)
    node.put_files({CONFIG_NAME: (b'{"nodes": []}', 0o600)})
    node.start()
    begun = node.state()
    assert begun.version == own_version()
    assert begun.files_digest == files_digest({CONFIG_NAME: (b'{"nodes": []}', 0o600)})
    wait_for(lambda: not node.state().is_running, 20.0)
    assert node.state().exit_code == 3
    assert "model is missing" in node.tail(1)
    node.start()
    assert "model is missing" in node.log.with_name("node.log.1").read_text()
    node.stop()
