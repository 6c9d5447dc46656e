"""`macrame up` as a user runs it, with nodes of this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import load_config
from cluster.errors import UserError
from deploy import up as up_command
from deploy.restarts import MAX_RESTARTS
from deploy.target import client_for
from deploy.up_record import cluster_folder
from tests.terminal import on_terminal
from tests.up_process import WAIT_S, Up, down, files_of, left_over, own_address, pid_of, up, write_config

long = pytest.mark.long


def edit(config: Path, **values: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def refused(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of an `up` that is expected to end at once."""
    command = [sys.executable, "-m", "deploy.up", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60.0)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def ready(ring: Up) -> None:
    ring.wait("ready")


def test_a_node_is_started_mended_found_again_and_stopped(tmp_path: Path) -> None:
    config = write_config(tmp_path, names="a")
    with up(config) as ring:
        ready(ring)
        killed = pid_of(config, 0)
        os.kill(killed, signal.SIGKILL)
        died = ring.wait("died", rank=0)
        assert died["exit_code"] == -9
        assert died["text"].startswith("a was killed by signal 9; the end of its log:\n")
        ring.wait("restarted", rank=0)
        ring.process.kill()  # the node goes on
        ring.process.wait()
        pid = pid_of(config, 0)
        assert pid != killed
        with up(config, "--detach") as second:
            ready(second)
            assert [e["text"] for e in second.events if e["event"] == "adopted"] == [
                f"a runs already (process {pid}): kept."
            ]
            assert second.finish() == 0
            assert psutil.pid_exists(pid)
            stopped = down(config)
        assert [(n["name"], n["was_running"], n["left"]) for n in stopped["nodes"]] == [("a", True, "")]
        assert stopped["code"] == 0
    assert not left_over(cluster_folder(config))


def test_an_end_before_the_ring_is_ready_leaves_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with up(config) as ring:
        ring.wait("started")
        ring.process.send_signal(signal.SIGTERM)
        assert ring.finish() == 130
        assert ring.kinds()[-1] == "stopped"
    assert not left_over(cluster_folder(config))


def test_a_taken_port_is_told_with_who_has_it(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    port = json.loads(config.read_text())["nodes"][1]["port"]
    with socket.create_server(("127.0.0.1", port)):
        code, text = refused("--config", config)
    assert code == 1
    assert f"macrame up: port {port} of b is taken by process {os.getpid()} (" in text
    assert "stop what listens there, or write another port into the cluster file" in text
    assert not left_over(cluster_folder(config))


def test_what_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    config = write_config(tmp_path, host="mini9.local")
    assert refused("--config", config) == (
        3,
        f"macrame up: a, b of {config} are not on this machine: add --ssh to start what is on other machines "
        "too, or start it there with run_node\n",
    )
    code, text = refused("--config", config, "--exclude", "bb")
    assert (code, text) == (3, 'macrame up: --exclude bb: "bb" is no node, the nearest is "b"\n')
    edit(config, api={"port": 0})
    assert refused("--config", config) == (
        3,
        f"macrame up: {config}: api.port is 0, any free port: give it a number, at which up can follow the "
        "ring\n",
    )
    assert not cluster_folder(config).exists()


def test_wheels_are_to_be_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "wheels"
    with pytest.raises(SystemExit) as ended:
        up_command.main(["--config", "cluster.json", "--find-links", str(missing)])
    assert ended.value.code == 3
    assert capsys.readouterr().err == (
        f"macrame up: --find-links {missing} is no folder of this machine; see macrame up --help\n"
    )


def test_ssh_destinations_are_the_hosts_unless_others_are_given(tmp_path: Path) -> None:
    path = write_config(tmp_path, host="mini9.local")
    config = load_config(path)

    def destinations(*given: str) -> dict[int, str | None]:
        return up_command._destinations(config, Namespace(config=path, ssh=True, ssh_to=list(given)))

    assert destinations() == {0: "mini9.local", 1: "mini9.local"}
    assert destinations("b=me@mini9") == {0: "mini9.local", 1: "me@mini9"}
    for given, message in (
        ("a", "--ssh-to a must be NODE=DESTINATION, as mini2=alice@mini2.local"),
        (
            "a=-oProxyCommand=x",
            "--ssh-to a=-oProxyCommand=x must be NODE=DESTINATION, as mini2=alice@mini2.local",
        ),
        ("c=x", f"--ssh-to c=x: {path} has only a, b"),
    ):
        with pytest.raises(UserError) as caught:
            destinations(given)
        assert (str(caught.value), caught.value.exit_code) == (message, 3)


@long
def test_a_node_that_dies_again_and_again_is_given_up_and_the_others_go_on(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with up(config) as ring:
        ready(ring)
        for num in range(1, MAX_RESTARTS + 1):
            os.kill(pid_of(config, 1), signal.SIGKILL)
            ring.wait("restarted", rank=1)
            assert ring.events[-1]["restarts"] == num
        os.kill(pid_of(config, 1), signal.SIGKILL)
        given_up = ring.wait("given_up", rank=1)
        assert given_up["text"].endswith("\nIt is not started again.")
        assert psutil.pid_exists(pid_of(config, 0))
        ring.process.send_signal(signal.SIGINT)
        assert ring.finish() == 0


@long
def test_a_terminal_that_is_closed_stops_a_ring_that_serves(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "deploy.up", "--config", str(config)]
    with on_terminal(command, folder=Path(__file__).resolve().parent.parent) as terminal:
        try:
            terminal.expect("Ready after", WAIT_S)
            terminal.expect("Ctrl-C stops all nodes", WAIT_S)
            assert terminal.hang_up() == 0
            assert not left_over(cluster_folder(config))
        finally:
            down(config)


@long
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_ring_that_serves(tmp_path: Path, sent: signal.Signals) -> None:
    config = write_config(tmp_path)
    with up(config) as ring:
        ready(ring)
        ring.process.send_signal(sent)
        assert ring.finish() == 0
        assert ring.kinds()[-1] == "stopped"
    assert not left_over(cluster_folder(config))
    assert down(config)["nodes"] == []


@long
def test_an_edited_config_starts_its_nodes_again_and_stops_those_that_it_lacks(tmp_path: Path) -> None:
    config = write_config(tmp_path, names="abc")
    with up(config, "--detach") as ring:
        ready(ring)
        document = json.loads(config.read_text())
        document["nodes"].pop()
        document["nodes"][1]["layers"] = "3:9"
        before = [pid_of(config, rank) for rank in range(3)]
        edit(config, **document)
        with up(config, "--detach") as second:
            ready(second)
            assert second.kinds().count("replaced") == 2
            removed = next(e for e in second.events if e["event"] == "removed")
            assert removed["text"] == "c on this machine is no more in the config: stopped."
            assert not any(map(psutil.pid_exists, before))
            assert len(left_over(cluster_folder(config))) == 2
    assert not left_over(cluster_folder(config))


@long
def test_plan_options_reach_the_head_and_other_ones_start_it_again(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    document = json.loads(config.read_text())
    for node in document["nodes"]:
        del node["layers"]
    edit(config, **document)
    with up(config, "--detach", "--exclude", "b", "--keep-order", "--force") as ring:
        ready(ring)
        head, other = (psutil.Process(pid_of(config, rank)).cmdline() for rank in (0, 1))
        assert head[head.index("--rank") + 2 : -2] == ["--exclude=b", "--keep-order", "--force"]
        assert other[other.index("--rank") + 2 : -2] == []
        assert layers(config) == ["0:9", ""]
        with up(config, "--detach", "--exclude", "a") as second:
            ready(second)
            told = {e["rank"]: e["text"] for e in second.events if e["event"] in ("replaced", "adopted")}
            assert told[0] == "a runs with other plan options: starting it again."
            assert told[1].endswith(": kept.")
            assert layers(config) == ["", "0:9"]


def layers(config: Path) -> list[str]:
    """Of each node, as the ring's API tells."""
    nodes = client_for(load_config(config)).cluster()["nodes"]
    return [
        f"{told['start']}:{told['stop']}" if told["stop"] else "" for told in (node["node"] for node in nodes)
    ]


@long
def test_a_node_that_was_started_by_hand_is_named_and_left_alone(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "cluster.run_node", "--rank", "1", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as node:
        try:
            assert node.stdout is not None
            assert "NODE_READY" in node.stdout.readline()
            code, text = refused("--config", config)
            assert code == 1
            assert f"macrame up: b (rank 1) is served already by process {node.pid} (python" in text
            assert f" -m cluster.run_node --rank 1 --config {config}"[:40] in text
            assert (
                " which this macrame up did not start and leaves alone: end it there (Ctrl-C or kill;" in text
            )
            edit(config, context=128)
            code, text = refused("--config", config)
            assert code == 1
            assert "), a node 'b' of another config, which this macrame up did not start" in text
            assert node.poll() is None
        finally:
            node.terminate()
    assert not left_over(cluster_folder(config))


@long
def test_a_broken_config_leaves_the_nodes_that_run_alone_and_down_still_finds_them(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with up(config, "--detach") as ring:
        ready(ring)
        config.write_text("{")
        code, text = refused("--config", config)
        assert code == 3
        assert "is not valid JSON" in text
        assert all(psutil.pid_exists(pid_of(config, rank)) for rank in (0, 1))
        assert [n["was_running"] for n in down(config)["nodes"]] == [True, True]


@long
def test_down_ends_an_up_that_follows_and_a_second_up_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with up(config) as ring:
        ready(ring)
        code, text = refused("--config", config)
        assert code == 1
        assert f"macrame up of {config} runs already, as process {ring.process.pid}: press Ctrl-C" in text
        assert [n["was_running"] for n in down(config)["nodes"]] == [True, True]
        assert ring.finish() == 0


@long
def test_the_head_is_started_again_too(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with up(config) as ring:
        ready(ring)
        os.kill(pid_of(config, 0), signal.SIGKILL)
        ring.wait("restarted", rank=0)
        ring.wait("ring", status="ok")


@long
def test_a_model_that_does_not_fit_is_the_head_s_exit_code_and_its_last_word(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    document = json.loads(config.read_text())
    for node in document["nodes"]:
        node["memory_gb"] = 0.01
    edit(config, **document)
    code, text = refused("--config", config)
    assert code == 2
    assert "macrame up: a ended with exit code 2; the end of its log:" in text
    assert "MB are missing; " in text
    assert not left_over(cluster_folder(config))


@long
def test_time_that_is_up_is_said_and_everything_stopped(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code, text = refused("--config", config, "--wait-s", "0.2")
    assert code in (1, 4)
    assert "the ring was not ready after 0.2 s (--wait-s): " in text
    assert not left_over(cluster_folder(config))


@long
def test_beyond_loopback_the_first_up_makes_certificates_and_the_next_changes_nothing(tmp_path: Path) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address beyond loopback")
    (tmp_path / "keys").write_text("key-one\n")
    (tmp_path / "keys").chmod(0o600)
    config = write_config(tmp_path, host=address)
    edit(config, api={**json.loads(config.read_text())["api"], "keys_file": "keys"}, announce=False)
    before = config.read_text()
    with up(config, "--detach") as ring:
        ready(ring)
        assert ring.kinds()[:3] == ["certificate", "certificate", "config"]
    after = config.read_text()
    assert after.startswith(before[: before.rindex("}")])
    assert json.loads(after)["security"]["tls"]["key"] == "certs/{name}.key"
    files = files_of(config, 0)
    assert files["certs/a.key"] == files["api_keys"] == files["cluster.json"] == 0o600
    assert "certs/b.key" not in files
    with up(config, "--detach") as ring:
        ready(ring)
        assert not {"certificate", "config"} & set(ring.kinds())
    assert config.read_text() == after
