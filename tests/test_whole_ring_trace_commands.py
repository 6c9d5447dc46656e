"""`macrame trace` and `macrame profile --memory` as people type them: a ring that runs, or one for it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EXIT_OK, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from deploy import bench, profile, trace
from deploy.client import Client
from proto import control_pb2_grpc, trace_pb2
from tests.ring_processes import NO_GUESSES, RingProcesses, free_ports
from tests.trace_checks import check_rows

pytestmark = pytest.mark.long
DEMO = Path(__file__).parent.parent / "deploy" / "demo" / "model"


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    folder = tmp_path_factory.mktemp("traced")
    layers = [(0, 3), (3, 8), (8, 9)]
    with RingProcesses(folder, DEMO, layers, with_api=True, speculation=NO_GUESSES) as ring:
        ring.wait_api()
        yield ring


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


@pytest.mark.parametrize("way", ["config", "url"])
def test_a_running_ring_is_traced(
    ring: RingProcesses, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    target = str(ring.config_path) if way == "config" else f"http://127.0.0.1:{ring.api_port}"
    out, plot = tmp_path / "t.json", tmp_path / "t.svg"
    asked = [f"--{way}", target, "--tokens", "12", "--out", str(out)]
    assert trace.main([*asked, "--json", "--plot", str(plot)]) == EXIT_OK
    told = printed(capsys)
    assert (told["tokens"], told["trips"], told["trouble"], told["file"]) == (12, 11, [], str(out))
    assert sum(part["share"] for part in told["parts"]) == pytest.approx(1)
    file = json.loads(out.read_text())
    assert check_rows(file) > 11 * 15
    assert file["otherData"]["parts"] == told["parts"]
    assert "n1 3:8" in plot.read_text()
    assert trace.main([*asked, "--layers"]) == EXIT_OK
    text = capsys.readouterr().out
    assert "a whole trip" in text
    assert "note: layers were evaluated by themselves" in text


def test_the_api_refuses_what_is_wrong_and_one_trace_at_a_time(ring: RingProcesses) -> None:
    client = Client("127.0.0.1", ring.api_port)
    for wrong, what in (
        ({"tokens": 0}, "400: tokens: Input should be greater than or equal to 1"),
        ({"tokens": 10**6}, "400: tokens: Input should be less than or equal to 4096"),
        ({"token": 3}, "400: token: Extra inputs are not permitted"),
        (
            {"prompt_tokens": 511, "tokens": 8},
            "400: a prompt of 511 and an answer of 8 tokens exceed the con",
        ),
    ):
        with pytest.raises(UserError, match=what):
            client.post("/v1/cluster/trace", wrong, 60)
    told: list[dict[str, Any]] = []
    body = {"tokens": 150, "is_warmed": False}
    first = threading.Thread(target=lambda: told.append(client.post("/v1/cluster/trace", body, 60)))
    first.start()
    try:
        ring.wait_status(lambda status: status.num_active == 1)
        with pytest.raises(UserError, match="409: A trace is being made already"):
            client.post("/v1/cluster/trace", {"tokens": 4}, 60)
    finally:
        first.join()
    assert told[0]["summary"]["tokens"] == 150


@pytest.mark.parametrize("command", ["trace --url", "trace --config", "profile --memory", "bench"])
def test_a_request_beyond_the_plans_context_is_refused(
    ring: RingProcesses, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """The file names no context, so that only the ring knows it."""
    path, url = tmp_path / "cluster.json", f"http://127.0.0.1:{ring.api_port}"
    config = json.loads(ring.config_path.read_text())
    context = config.pop("context")
    path.write_text(json.dumps(config))
    long = ["--prompt-tokens", str(context)]
    if command == "bench":
        assert bench.main(["--url", url, *long]) == EXIT_USAGE
    elif command == "profile --memory":
        assert profile.main(["--memory", "--config", str(path), *long]) == EXIT_USAGE
    else:
        target = ["--url", url] if "url" in command else ["--config", str(path)]
        assert trace.main([*target, *long]) == EXIT_USAGE
    said = rf"a prompt of {context} and an answer of \d+ tokens exceed the context of {context} tokens"
    assert re.search(rf"{said} \(the plan\): ask for less", capsys.readouterr().err)


def test_a_caller_that_leaves_ends_the_trace(ring: RingProcesses) -> None:
    client = Client("127.0.0.1", ring.api_port)
    with pytest.raises(UserError, match="has been silent"):
        client.post("/v1/cluster/trace", {"tokens": 400}, 1.0)
    ring.wait_status(lambda status: status.num_active == 0, timeout_s=5)
    for rank in range(3):
        with ring.channel(rank) as channel:
            assert is_let_go(control_pb2_grpc.ControlStub(channel)), f"rank {rank} is traced for nobody"


def is_let_go(stub: control_pb2_grpc.ControlStub) -> bool:
    """Whether the node can be traced anew within some seconds."""
    pause = threading.Event()
    for _ in range(100):
        if not stub.Trace(trace_pb2.TraceRequest(id="after", lease_s=9)).reason:
            stub.Trace(trace_pb2.TraceRequest(id="after"))
            return True
        pause.wait(0.05)
    return False


def test_the_memory_of_a_running_ring(
    ring: RingProcesses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.json"
    asked = ["--memory", "--config", str(ring.config_path), "--tokens", "8", "--out", str(out)]
    assert profile.main([*asked, "--json"]) == EXIT_OK
    told = printed(capsys)
    assert told["has_load"] is False
    assert [node["load_s"] for node in told["nodes"]] == [None] * 3
    for node in told["nodes"]:
        measured, predicted = node["measured"], node["predicted"]
        assert measured["weight_bytes"] == pytest.approx(predicted["weight_bytes"], rel=0.03)
        assert 0 < measured["kv_bytes"] <= predicted["kv_bytes"]
        assert 0 < measured["activation_bytes"] <= predicted["activation_bytes"]
        assert measured["mlx_peak_bytes"] <= predicted["sum_bytes"]
    counters = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "C"]
    assert {event["pid"] for event in counters} == {1, 2, 3}


def test_the_load_of_a_ring_that_is_started_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *ports, api_port = free_ports(3)
    nodes = [{"host": "127.0.0.1", "port": port, "memory_gb": 16} for port in ports]
    path = tmp_path / "cluster.json"
    config = {"model": str(DEMO), "context": 256, "nodes": nodes, "api": {"port": api_port}}
    path.write_text(json.dumps(config))
    out = tmp_path / "m.json"
    asked = ["--memory", "--config", str(path), "--tokens", "6", "--out", str(out)]
    assert profile.main([*asked, "--json"]) == EXIT_OK
    told = printed(capsys)
    assert told["has_load"] is True
    events = json.loads(out.read_text())["traceEvents"]
    for node in told["nodes"]:
        if node["predicted"] is None:
            continue  # the plan gave all to the other one
        assert node["load_s"] > 0
        weights = [
            e["args"]["weights"]
            for e in events
            if e["ph"] == "C" and e["pid"] == node["rank"] + 1 and "weights" in e["args"]
        ]
        assert weights[0] == 0
        assert weights[-1] == node["measured"]["weight_bytes"]
    out = tmp_path / "t.json"
    assert trace.main(["--config", str(path), "--tokens", "4", "--out", str(out)]) == EXIT_OK
    assert check_rows(json.loads(out.read_text())) > 0


def test_what_cannot_be_done_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert trace.main(["--url", f"http://127.0.0.1:{port}"]) == EXIT_UNREACHABLE
    assert "is the ring running?" in capsys.readouterr().err
    assert trace.main(["--out", str(tmp_path / "no" / "t.json")]) == EXIT_USAGE
    assert "is no folder: give another --out" in capsys.readouterr().err
    assert profile.main(["--memory", "--out", str(tmp_path / "no" / "t.json")]) == EXIT_USAGE
    capsys.readouterr()
    assert profile.main(["--config", "cluster.json"]) == EXIT_USAGE
    assert "--config goes with --memory" in capsys.readouterr().err
