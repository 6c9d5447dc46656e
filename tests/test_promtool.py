"""Prometheus itself on a real ring: its linter, a server that scrapes, and each question of the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ring_processes import RingProcesses, free_ports
from tests.test_whole_ring_observed import BOARD, targets
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

pytestmark = pytest.mark.long

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (apt: prometheus)")
needs_both = pytest.mark.skipif(
    PROMTOOL is None or PROMETHEUS is None, reason="prometheus is not installed (apt: prometheus)"
)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("ring")
    model = write_checkpoint("llama", directory / "tiny", num_layers=5)
    with (
        RingProcesses(directory, model, [(0, 2), (2, 5)], with_api=True) as ring,
        httpx.Client(base_url=ring.wait_api(), timeout=30.0) as client,
    ):
        yield client


def complete(http: httpx.Client, **values: Any) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": "zebra",
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        **values,
    }
    reply = http.post("/v1/completions", json=body)
    assert reply.is_success, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


def errors(http: httpx.Client) -> dict[str, float]:
    found = re.findall(
        r'^macrame_request_errors_total\{kind="(\w+)"\} (\S+)', http.get("/metrics").text, re.MULTILINE
    )
    return {kind: float(count) for kind, count in found}


def expressions() -> list[str]:
    """As Grafana sends them."""
    return [
        expression.replace("$job", ".*").replace("$__rate_interval", "10s") for expression, _ in targets()
    ]


@needs_promtool
def test_the_linter_finds_nothing_wrong_with_a_real_rings_page(http: httpx.Client) -> None:
    complete(http)
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=http.get("/metrics").text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_stop_string_is_no_error(http: httpx.Client) -> None:
    text = complete(http)["text"]
    before = errors(http)
    assert before["cancelled"] == 0
    for is_streamed in (False, True):
        body = {"model": "tiny", "prompt": "zebra", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        reply = http.post("/v1/completions", json={**body, "stop": text[:2], "stream": is_streamed})
        assert '"finish_reason": "stop"' in reply.text.replace('":"', '": "'), (text, reply.text)
    wait_for(lambda: "macrame_sessions_active 0.0" in http.get("/metrics").text, 10.0)
    assert errors(http) == before


@needs_both
def test_each_question_of_the_dashboard_has_an_answer(http: httpx.Client, tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    (port,) = free_ports(1)
    settings = tmp_path / "prometheus.yml"
    target = str(http.base_url).removeprefix("http://").rstrip("/")
    scrape = {"job_name": "macrame", "static_configs": [{"targets": [target]}]}
    settings.write_text(
        json.dumps(
            {"global": {"scrape_interval": "500ms", "scrape_timeout": "400ms"}, "scrape_configs": [scrape]}
        )
    )
    arguments = [f"--config.file={settings}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    server = subprocess.Popen(
        [PROMETHEUS, *arguments, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    asked = expressions()
    missing = set(asked)

    def all_answered() -> bool:
        complete(http)
        for expression in sorted(missing):
            try:
                reply = own.get("/api/v1/query", params={"query": expression})
            except httpx.TransportError:  # it starts
                return False
            if reply.status_code == 503:
                return False
            told = reply.json()
            assert told["status"] == "success", (expression, told)
            values = [one["value"][1] for one in told["data"]["result"]]
            if values and any(value != "NaN" for value in values):
                missing.discard(expression)
        return not missing

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as own:
            try:
                wait_for(all_answered, 30.0)
            except AssertionError:
                raise AssertionError(f"no answer to {sorted(missing)}") from None
    finally:
        server.terminate()
        server.wait(10.0)
    assert len(asked) > 30
    assert BOARD.exists()
