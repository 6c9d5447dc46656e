"""`macrame bench` on real rings: all its figures, Ctrl-C in the middle, and a load that is too much."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_config
from deploy.command import INTERRUPTED
from tests.ring_processes import RingProcesses
from tests.test_demo import MODEL, left_over, write_config
from tests.test_plot import texts
from tests.waiting import wait_for

pytestmark = pytest.mark.long
WAIT_S = 100.0


@contextmanager
def bench(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "deploy.bench", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def all_of(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, told = process.communicate(timeout=WAIT_S)
    assert out, told
    return json.loads(out), told


def is_rising(percentiles: dict[str, float]) -> bool:
    return 0 < percentiles["p50"] <= percentiles["p90"] <= percentiles["p99"]


def test_held_out_text_on_a_ring_of_its_own_measured_and_drawn(tmp_path: Path) -> None:
    config, plot = write_config(tmp_path), tmp_path / "bench.svg"
    load = ("--concurrency", "1,6", "--prompt-tokens", 24, "--output-tokens", 12, "--requests", 2)
    with bench("--config", config, *load, "--dataset", "demo", "--plot", plot, "--json") as process:
        result, told = all_of(process)
    assert process.returncode == 0, told
    assert (result["dataset"], result["seed"], result["max_active"]) == ("demo", 0, 4)
    assert "note: this plan serves 4 at once" in told
    assert told.index("1 user: warming up") < told.index("6 users: measuring 12 answers")
    assert sum(stage["stop"] - stage["start"] for stage in result["stages"]) == 9
    for run, users in zip(result["runs"], (1, 6), strict=True):
        assert (run["concurrency"], run["num_requests"], run["is_whole"]) == (users, 2 * users, True)
        assert run["output_tokens"] == 2 * users * 12
        assert run["aggregate_tok_s"] == pytest.approx(run["output_tokens"] / run["wall_s"])
        assert run["ttft_s"] * 1e3 == pytest.approx(run["ttft_ms"]["p50"])
        assert is_rising(run["ttft_ms"])
        assert is_rising(run["gap_ms"])
        assert is_rising(run["hop_ms"])
        assert all(0 < share < 1.05 for share in run["stage_busy"])
        assert run["cpu_ms_per_token"] > 0
    assert {"1", "6", *(stage["node"] for stage in result["stages"])} <= set(texts(plot))
    assert left_over(config) == []


def test_ctrl_c_ends_with_what_was_measured_so_far(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    url = f"http://127.0.0.1:{load_config(config).api.port}/v1/cluster"
    load = ("--concurrency", "1,2", "--prompt-tokens", 8, "--output-tokens", 600, "--requests", 1)
    with bench("--config", config, *load, "--json") as process:
        assert process.stderr is not None
        told = ""
        while "2 users: measuring" not in told:
            told += process.stderr.readline()

        def tokens() -> list[int]:  # of the requests that run: a warm-up's have at most 16
            with urllib.request.urlopen(url, timeout=20.0) as reply:
                return [request["completion_tokens"] for request in json.load(reply)["requests"]]

        wait_for(lambda: sum(tokens()) > 40, WAIT_S, "answers of the second run")
        process.send_signal(signal.SIGINT)
        result, rest = all_of(process)
    assert process.returncode == INTERRUPTED
    assert "All nodes stopped in" in rest
    first, second = result["runs"]
    assert (first["is_whole"], first["output_tokens"]) == (True, 600)
    assert (second["is_whole"], second["num_requests"]) == (False, 0)
    assert 0 < second["output_tokens"] < 1200
    assert is_rising(second["gap_ms"])
    assert left_over(config) == []


def test_a_load_that_is_refused_ends_with_what_was_measured_before(tmp_path: Path) -> None:
    with RingProcesses(tmp_path, MODEL, [(0, 4), (4, 9)], concurrency=1, with_api=True) as ring:
        url = ring.wait_api()
        load = ("--prompt-tokens", 8, "--output-tokens", 8, "--requests", 1, "--warm-up", 0, "--json")
        with bench("--url", url, "--concurrency", "1,100", *load) as process:
            result, told = all_of(process)
    assert process.returncode == 1
    assert [run["concurrency"] for run in result["runs"]] == [1]
    assert "/v1/completions answers 429: " in told.splitlines()[-1]
