"""The process that keeps a Mac awake, with a script in caffeinate's place."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.caffeinate import KeepAwake, caffeinate_command
from tests.node_process import node, write_cluster
from tests.waiting import wait_for

# as caffeinate -w does: ends with the process that it is given
WAITS = "import os, sys, select; select.select([os.pidfd_open(int(sys.argv[-1]))], [], [])"


def test_a_mac_is_kept_from_sleep_but_not_its_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert caffeinate_command(17) == ("/usr/bin/caffeinate", "-i", "-s", "-w", "17")
    monkeypatch.setattr(sys, "platform", "linux")
    assert caffeinate_command(17) == ()


def test_it_lasts_from_start_to_close() -> None:
    awake = KeepAwake(["sleep", "60"])
    assert awake.pid is None
    awake.start()
    assert awake.pid is not None
    process = psutil.Process(awake.pid)
    assert process.is_running()
    awake.close()
    assert not process.is_running()
    assert awake.pid is None
    awake.close()


def test_one_that_does_not_end_is_killed() -> None:
    awake = KeepAwake(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
    awake.start()
    process = psutil.Process(awake.pid)
    wait_for(lambda: bool(process.children()), what="its trap is set")
    (child,) = process.children()
    awake.close()
    assert not process.is_running()
    child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open is Linux's")
def test_it_ends_with_a_node_that_is_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as node:
        awake = KeepAwake([sys.executable, "-c", WAITS, str(node.pid)])
        awake.start()
        process = psutil.Process(awake.pid)
        node.kill()
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)  # we are its parent and have not asked yet
    awake.close()


def test_a_machine_without_it_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = str(tmp_path / "caffeinate")
    with caplog.at_level(logging.WARNING):
        awake = KeepAwake([missing])
        awake.start()
        awake.close()
    assert caplog.messages == [
        f"this machine may fall asleep: {missing} cannot be run: No such file or directory"
    ]


def test_nothing_is_run_where_nothing_need() -> None:
    awake = KeepAwake(())
    awake.start()
    assert awake.pid is None
    awake.close()


def test_a_node_has_it_from_its_first_line_to_its_end(tmp_path: Path) -> None:
    config = write_cluster(tmp_path, "m", node(), node())
    script = (
        "import sys, cluster.runtime as runtime\n"
        "runtime.caffeinate_command = lambda pid: ('sleep', '60')\n"
        "from cluster.run_node import main\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "--rank", "1", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("NODE_READY 1 ")
        wait_for(lambda: bool(sleepers(process.pid)))
        (sleeper,) = sleepers(process.pid)
        process.terminate()
        assert process.wait(10.0) == 0
    assert not sleeper.is_running()


def sleepers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if child.name() == "sleep"]
