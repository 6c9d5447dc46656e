"""`macrame serve`: what it refuses, and real models served until Ctrl-C."""

from __future__ import annotations

import errno
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import load_config
from deploy import bring_up, serve
from deploy.demo.run import CONFIG
from deploy.local_ring import LocalRing, free_ports
from tests.up_process import write_config

MODEL = CONFIG.parent / "model"
WAIT_S = 60.0


# -- what it refuses ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL, or --config with a cluster file"),
        (["m", "--config", "c.json"], "give a MODEL, or --config with a cluster file"),
        (
            ["--config", "c.json", "--port", "1"],
            "--port is for a MODEL: with --config, the cluster file says",
        ),
        (["--config", "c.json", "--keys-file", "k"], "--keys-file is for a MODEL"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    assert ended.value.code == 3
    assert capsys.readouterr().err.startswith(f"macrame serve: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port 0 is not a port (1 to 65535)"),
        (["--port", "70000"], "--port 70000 is not a port (1 to 65535)"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, which needs API keys: write one a"),
        (["--kv-bits", "3"], "--kv-bits = 3 must be one of 4, 8"),
        (["--context", "0"], "--context = 0 must be a whole number from 1 to"),
        (["--concurrency", "-2"], "--concurrency = -2 must be a whole number from 1 to"),
        (["--max-memory-gb", "0"], "--max-memory-gb = 0.0 must be a number above 0"),
        (["--keys-file", "nowhere.txt"], '--keys-file = "'),
        (
            ["--host", "192.0.2.7", "--keys-file", "keys.txt"],
            "nothing can listen at 192.0.2.7 (api.host) on this machine (",
        ),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("one\n")
    keys.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    with restored_signals():
        assert serve.main([str(MODEL), *arguments]) == 3
    assert capsys.readouterr().err.startswith(f"macrame serve: {message}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere", "there is no model folder /nowhere, and '/nowhere' is no hub id"),
        (str(CONFIG.parent), "has no config.json: a model folder holds config.json and safetensors"),
    ],
)
def test_a_model_that_is_none(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([model]) == 3
    assert message in capsys.readouterr().err


def test_a_config_of_other_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "far.json"
    path.write_text(json.dumps({"model": "m", "nodes": [{"host": "192.0.2.7", "memory_gb": 8}]}))
    assert serve.main(["--config", str(path)]) == 3
    assert capsys.readouterr().err == (
        f"macrame serve: {path} names other machines, and serve runs nodes on this one: "
        f"'macrame up --config {path}' starts them all\n"
    )


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    port = load_config(path).nodes[1].port
    with socket.socket() as other, restored_signals():
        other.bind(("127.0.0.1", port))
        other.listen()
        assert serve.main(["--config", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"macrame serve: port {port} (nodes[1].port) is taken here: stop what uses it, such as another ring, "
        "or give another port\n"
    )


def test_a_port_of_the_system() -> None:
    error = bring_up._no_place("api", "127.0.0.1", 80, PermissionError(errno.EACCES, "Permission denied"))
    assert str(error) == ("port 80 (api.port) is kept for the system's own servers: give one from 1024 on")


def test_a_node_that_ends_by_itself_says_why_in_its_own_sentence(tmp_path: Path) -> None:
    ring = LocalRing(tmp_path / "none.json", [0], tmp_path)
    ring.log(0).write_text("NODE_READY 0 127.0.0.1 1\nrun_node: it does not fit\n")
    assert ring._last_words(0) == "it does not fit"
    ring.log(0).write_text("run_node: loading\nSegmentation fault\n")
    assert ring._last_words(0) == ""


@contextmanager
def restored_signals() -> Iterator[None]:
    """`running` sets handlers, as a command that has a process to itself may."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


# -- real rings ---------------------------------------------------------------------------------------------
@contextmanager
def serving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "deploy.serve", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            nodes = nodes_of(process) if process.poll() is None else []
            process.kill()
            for node in nodes:
                node.kill()


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it says as JSON when it serves."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=WAIT_S)
    return dict(json.loads(line))


def nodes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_model_alone_is_served_until_it_is_stopped(number: signal.Signals) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    with serving(str(MODEL), "--port", str(port), "--context", "64", "--json") as process:
        told = ready(process)
        assert told == {"event": "ready", "url": f"http://127.0.0.1:{port}", "model": "model"}
        body = json.dumps({"prompt": "def add(a, b):", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"{told['url']}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 4
        nodes = nodes_of(process)
        assert nodes
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, json.loads(out)) == (0, {"event": "stopped"})
    assert re.search(r"Stopping \.\.\.\nAll nodes stopped in \d\.\d s\.\n$", err)
    assert not any(node.is_running() for node in nodes)


@pytest.mark.long
def test_the_nodes_of_a_config_are_served_and_told_in_words(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with serving("--config", str(path)) as process:
        assert process.stdout is not None
        port = load_config(path).api.port
        assert process.stdout.readline() == f"model is served at http://127.0.0.1:{port}/v1 until Ctrl-C.\n"
        assert process.stdout.readline() == (
            f"Talk to it from another terminal: macrame chat --url http://127.0.0.1:{port}\n"
        )
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "Starting 2 nodes on this machine ..." in err
    assert "NODE_READY" not in err


@pytest.mark.long
def test_a_node_that_dies_ends_it_with_the_log(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with serving("--config", str(path), "--json") as process:
        ready(process)
        (node,) = [one for one in nodes_of(process) if {"cluster.run_node", "1"} <= set(one.cmdline())]
        node.kill()
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert out == ""
    assert "macrame serve: node 1 was killed by signal 9; the end of its log:" in err


@pytest.mark.long
def test_what_a_node_refuses_is_the_sentence_and_the_exit_code() -> None:
    (port,) = free_ports("127.0.0.1", 1)
    arguments = [str(MODEL), "--port", str(port), "--context", "100000000"]
    with serving(*arguments) as process:
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"macrame serve: {MODEL} needs ")
    assert "lower --context to " in last


@pytest.mark.long
def test_ctrl_c_before_it_serves_stops_it(tmp_path: Path) -> None:
    with serving("--config", str(write_config(tmp_path))) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("starting: "):
                break
        nodes = nodes_of(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "Interrupted: stopping the nodes ..." in err
    assert not any(node.is_running() for node in nodes)
