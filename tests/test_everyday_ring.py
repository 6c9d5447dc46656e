"""`status`, `ps` and `models` asked of a real ring, once and with --watch, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.demo.run import CONFIG
from tests.ring_processes import RingProcesses
from tests.terminal import CTRL_C, on_terminal

pytestmark = pytest.mark.long
MODEL = CONFIG.parent / "model"
SLOW = {2: "step_delay_ms=40"}
LAYERS = [(0, 3), (3, 8), (8, 9)]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    folder = tmp_path_factory.mktemp("ring")
    with RingProcesses(folder, MODEL, LAYERS, concurrency=1, faults=SLOW, with_api=True) as ring:
        ring.wait_api()
        yield ring


@contextmanager
def busy(ring: RingProcesses) -> Iterator[None]:
    """One request runs and another is queued within the block."""
    command = [*macrame("generate", ring), "def add(a, b):", "--max-tokens", "450", "--min-tokens", "450"]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    try:
        ring.wait_status(lambda status: status.num_active == 1 and status.num_queued == 1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
        ring.wait_status(lambda status: status.num_active == 0 and status.num_queued == 0)


def macrame(command: str, ring: RingProcesses) -> list[str]:
    return [sys.executable, "-m", f"deploy.{command}", "--url", f"http://127.0.0.1:{ring.api_port}"]


def ask(*command: str, code: int = 0) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert result.returncode == code, result
    assert result.stderr == ""
    return result.stdout


def watched(*command: str, lines: int) -> list[str]:
    """So many lines of what --watch prints into a pipe; then it is stopped by Ctrl-C, which is no failure."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        got = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (0, "")
    return got


def test_status_and_ps_of_a_ring_at_rest(ring: RingProcesses) -> None:
    told = json.loads(ask(*macrame("status", ring), "--json"))
    assert [node["state"] for node in told["nodes"]] == ["ready"] * 3
    text = ask(*macrame("status", ring))
    assert text.startswith("model: ok\ncontext 512 tokens, 0 of 1 requests running, 0 queued")
    assert "0:3" in text
    assert ask(*macrame("ps", ring)) == "model: ok, 0 of 1 running, 0 queued\n\nno requests\n"
    assert json.loads(ask(*macrame("ps", ring), "--json"))["requests"] == []
    with_config = ask(sys.executable, "-m", "deploy.ps", "--config", str(ring.config_path))
    assert with_config.endswith("no requests\n")


def test_ps_shows_who_runs_and_who_waits(ring: RingProcesses) -> None:
    with busy(ring):
        told = json.loads(ask(*macrame("ps", ring), "--json"))
        assert sorted(request["state"] for request in told["requests"]) == ["decode", "queued"]
        text = ask(*macrame("ps", ring))
        assert "1 of 1 running, 1 queued" in text
        frames = [
            json.loads(line) for line in watched(*macrame("ps", ring), "--json", "--watch", "0.3", lines=3)
        ]
    counts = [max(request["completion_tokens"] for request in frame["requests"]) for frame in frames]
    assert counts == sorted(set(counts)), "it grows from frame to frame"


def test_status_watch_in_a_pipe(ring: RingProcesses) -> None:
    with busy(ring):
        frames = [
            json.loads(line)
            for line in watched(*macrame("status", ring), "--json", "--watch", "0.3", lines=3)
        ]
        assert [frame["num_active"] for frame in frames] == [1, 1, 1]
        text = "".join(watched(*macrame("status", ring), "--watch", "0.3", lines=100))
    assert "\x1b" not in text
    assert "tokens/s in all" in text  # from the second table on


@pytest.mark.parametrize(("columns", "sign"), [(160, "rank  node"), (40, "rank 0, node n0"), (20, "rank 0,")])
def test_watch_on_a_terminal(ring: RingProcesses, columns: int, sign: str) -> None:
    command = [*macrame("status", ring), "--watch", "0.2"]
    with busy(ring), on_terminal(command, columns=columns, rows=200) as terminal:
        terminal.expect(sign)
        terminal.expect("queued")  # no line is cut
        terminal.expect("tokens/s in all")
        terminal.type(CTRL_C)
        assert terminal.finish() == 0


def test_ps_watch_on_a_terminal_shows_the_speed(ring: RingProcesses) -> None:
    with busy(ring), on_terminal([*macrame("ps", ring), "--watch", "0.5"]) as terminal:
        terminal.expect("tokens/s")
        terminal.expect("decode")
        terminal.type(CTRL_C)
        assert terminal.finish() == 0
    assert "Traceback" not in terminal.seen


def test_models_of_every_node_and_of_one_that_is_away(ring: RingProcesses) -> None:
    command = [sys.executable, "-m", "deploy.models", "list", "--config", str(ring.config_path)]
    told: dict[str, Any] = json.loads(ask(*command, "--json"))
    running = [(node["running"]["start"], node["running"]["stop"]) for node in told["nodes"]]
    assert running == LAYERS
    assert f"rank 1 (n1): runs layers 3:8 of {MODEL}" in ask(*command)


def test_a_ring_that_loses_a_node_is_watched_on(tmp_path: Path) -> None:
    with RingProcesses(tmp_path, MODEL, LAYERS, with_api=True) as ring:
        ring.wait_api()
        process = subprocess.Popen(
            [*macrame("status", ring), "--json", "--watch", "0.2"], stdout=subprocess.PIPE, text=True
        )
        states: list[str] = []
        changed = threading.Condition()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                with changed:
                    states.append(json.loads(line)["status"])
                    changed.notify_all()

        reader = threading.Thread(target=read)
        reader.start()

        def wait(state: str) -> None:
            with changed:
                assert changed.wait_for(lambda: bool(states) and states[-1] == state, WAIT_S), states

        wait("ok")
        ring.kill(1)
        wait("degraded")
        ring.wait_status(lambda status: status.status != "ok")
        command = [*macrame("status", ring)]
        assert "rank 1 (n1): " in ask(*command, code=4)
        models = [sys.executable, "-m", "deploy.models", "--config", str(ring.config_path)]
        assert f"rank 1 (n1): does not answer at 127.0.0.1:{ring.ports[1]}" in ask(*models, code=4)
        ring.kill(0)
        wait("unreachable")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        reader.join(WAIT_S)
        assert process.stdout is not None
        process.stdout.close()


def test_a_key_that_is_missing_or_wrong(tmp_path: Path) -> None:
    with RingProcesses(tmp_path, MODEL, [(0, 9)], with_api=True, env={"MACRAME_API_KEYS": "right"}) as ring:
        ring.wait_api()
        url = f"http://127.0.0.1:{ring.api_port}"
        for command in (["ps"], ["status"], ["chat", "hi"], ["generate", "hi"]):
            for key, said in ((None, "wants an API key"), ("wrong", "does not accept this API key")):
                environment = {k: v for k, v in os.environ.items() if k != "MACRAME_API_KEYS"}
                result = subprocess.run(
                    [sys.executable, "-m", "deploy.cli", *command, "--url", url],
                    env=environment | ({} if key is None else {"MACRAME_API_KEYS": key}),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert (result.returncode, result.stdout) == (3, "")
                assert result.stderr == (
                    f"macrame {command[0]}: {url} {said}: set MACRAME_API_KEYS to one of its keys, or name "
                    "the ring's cluster file with --config\n"
                )
