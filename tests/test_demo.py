"""`macrame demo` as a user runs it: the answer, the figures, and that nothing is left whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import load_config
from deploy.demo.run import CONFIG
from deploy.local_ring import LocalRing, free_ports, is_free
from tests.waiting import PATIENT_S, is_in_time

MODEL = CONFIG.parent / "model"
WAIT_S = 60.0


def write_config(folder: Path, model: Path = MODEL) -> Path:
    """The demo's own config on ports of its own, so that tests may run beside each other and a demo."""
    document: dict[str, Any] = json.loads(CONFIG.read_text())
    *ports, api_port = free_ports("127.0.0.1", len(document["nodes"]) + 1)
    for node, port in zip(document["nodes"], ports, strict=True):
        node["port"] = port
    document["api"]["port"] = api_port
    document |= {"model": str(model), "silence_timeout_s": PATIENT_S}
    path = folder / "demo.json"
    path.write_text(json.dumps(document))
    return path


@contextmanager
def demo(config: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "deploy.demo.run", "--config", str(config), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process printed up to the line with `text`."""
    assert process.stdout is not None
    lines = ""
    for line in process.stdout:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in:\n{lines}")


def left_over(config: Path) -> list[str]:
    """Processes that were started with this config and still live."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if str(config) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(command))
    return found


def node_pid(config: Path, rank: int) -> int:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if command[1:5] == ["-m", "cluster.run_node", "--rank", str(rank)] and command[-1] == str(config):
                return int(process.pid)
    raise AssertionError(f"no process of rank {rank}")


def test_the_plan_of_the_demo_is_uneven_and_the_model_odd() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster.dry_run", "--config", str(CONFIG), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(result.stdout)
    counts = [part["stop"] - part["start"] for part in plan["assignments"]]
    assert len(counts) == 3
    assert len(set(counts)) > 1
    assert sum(counts) == plan["num_layers"]
    assert plan["num_layers"] % 2 == 1


def test_the_demo_answers_and_stops(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with demo(config, "--max-tokens", "60") as process:
        output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    assert output.index("The ring is ready after") < output.index("stage  rank  node")
    assert "strategy memory_proportional" in output
    answer, _, timing = output.partition("60 tokens at most\n\n")[2].partition("\n\n")
    assert answer.startswith("def fibonacci(n):\n    "), answer
    assert len(answer.split()) > 4, answer
    found = re.search(r"^(\d+) tokens, [1-9]\d*\.\d tokens/s, first token after [1-9]\d* ms$", timing, re.M)
    assert found is not None, timing
    assert 10 <= int(found[1]) <= 60
    shares = re.findall(r"^\d  +\w+ +\d+:\d+ +[\d.]+ [kM]B +[\d.]+ MB +(\d+)%$", output, flags=re.M)
    assert len(shares) == 3
    assert all(0 < int(share) < 90 for share in shares)
    assert re.search(r"All nodes stopped in [0-4]\.\d s\.\n$", output)
    assert left_over(config) == []


def test_taken_ports_are_replaced_and_named(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load_config(path)
    with socket.socket() as api, socket.socket() as node:
        api.bind(("127.0.0.1", config.api.port))
        api.listen()
        node.bind(("127.0.0.1", config.nodes[1].port))
        node.listen()
        with demo(path, "--max-tokens", "2") as process:
            output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    for port in (config.api.port, config.nodes[1].port):
        assert f"Port {port} is taken here: using " in output
    assert f"Port {config.nodes[0].port} " not in output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    config = write_config(tmp_path)
    with demo(config) as process:
        read_until(process, "starting: ")
        begin = time.monotonic()
        process.send_signal(signum)
        output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "Interrupted: stopping the nodes ..." in output
    assert "All nodes stopped in" in output
    assert is_in_time(time.monotonic() - begin, 8.0)
    assert left_over(config) == []


def test_a_node_that_dies_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with demo(config) as process:
        read_until(process, "starting: ")
        os.kill(node_pid(config, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "macrame demo: node 1 was killed by signal 9; the end of its log:" in output
    assert left_over(config) == []


def test_a_ring_that_cannot_start_says_why(tmp_path: Path) -> None:
    config = write_config(tmp_path, model=tmp_path / "nowhere")
    with demo(config) as process:
        output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode in (1, 3)
    assert re.search(r"macrame demo: node \d: there is no model folder ", output)
    assert f"there is no model folder {tmp_path}/nowhere" in output
    assert left_over(config) == []


def test_a_config_of_other_machines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "far.json"
    path.write_text(json.dumps({"model": "m", "nodes": [{"host": "192.0.2.7", "memory_gb": 8}]}))
    with demo(path) as process:
        output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert f"{path} names other machines, and this command runs all nodes on this one" in output


def test_what_ignores_sigterm_is_killed_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "cluster"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "run_node.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ring = LocalRing(tmp_path / "c.json", [4], tmp_path)
    ring.start()
    deadline = time.monotonic() + WAIT_S
    while "deaf" not in ring.tail(4) and time.monotonic() < deadline:
        ring.check()
    left = ring.stop(0.3)
    assert left[0] == f"process {ring.pids()[4]} (-m cluster.run_node --rank 4)"
    assert left[1].startswith("the end of the log of node 4:\n    deaf")
    assert not psutil.pid_exists(ring.pids()[4])


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports("127.0.0.1", 20)
    assert len(set(ports)) == 20
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))
        listener.listen()
        assert not is_free("127.0.0.1", ports[0])
    assert is_free("127.0.0.1", ports[1])


def test_bench_starts_the_ring_and_prints_one_object(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = [
        sys.executable,
        "-m",
        "deploy.bench",
        "--config",
        str(config),
        "--json",
        "--concurrency",
        "1,2",
    ]
    result = subprocess.run(
        [*command, "--prompt-tokens", "40", "--max-tokens", "16", "--requests", "1", "--warm-up", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert [run["concurrency"] for run in measured["runs"]] == [1, 2]
    for run in measured["runs"]:
        assert set(run) >= {
            *("concurrency", "decode_tok_s", "prefill_tok_s", "ttft_s", "aggregate_tok_s"),
            *("hop_ms", "stage_ms", "stage_busy", "cpu_ms_per_token", "acceptance"),
        }
        assert len(run["stage_ms"]) == len(run["stage_busy"]) == 3
        assert run["decode_tok_s"] > 0
        assert run["cpu_ms_per_token"] > 0
    assert [node["rank"] for node in measured["nodes"]] == [0, 1, 2]
    assert "The ring is ready after" in result.stderr
    assert left_over(config) == []
