"""Memory in a ring of real processes: what its status says, and what it does when a node runs short."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from planner.plan import Plan
from proto import control_pb2, head_pb2
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

LAYERS = [(0, 2), (2, 4), (4, 5)]
PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "model", num_layers=5)


def is_over(num_sessions: int, memory: control_pb2.MemoryStatus) -> bool:
    """Some request ran, and none does."""
    return num_sessions == 0 and memory.peak_kv_bytes > 0


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=20.0) as reply:
        return dict(json.load(reply))


def complete(url: str) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"model": "model", "prompt": PROMPT, "max_tokens": 3}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30.0) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def refusal(ring: RingProcesses) -> Any:
    """The head may hold requests a moment later than its own stream shows why."""
    while True:
        try:
            ring.tokens(PROMPT, 1)
        except grpc.RpcError as error:
            return error


def is_admitting(status: head_pb2.ClusterStatus, rank: int) -> bool:
    return bool(status.ranks[rank].node.memory.is_admitting)


def test_a_node_short_of_memory_stops_new_requests_only_and_recovers(tmp_path: Path, model: Path) -> None:
    share = tmp_path / "share"
    faults = {0: "step_delay_ms=40", 1: f"available_share={share}"}
    with RingProcesses(tmp_path, model, LAYERS, faults=faults, with_api=True) as ring:
        url = ring.wait_api()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ring.tokens, PROMPT, 150)
            ring.wait_status(lambda s: s.num_active == 1)
            share.write_text("0.01")
            status = ring.wait_status(lambda s: not is_admitting(s, 1))
            assert status.status == "ok"  # what runs goes on
            assert status.ranks[1].node.memory_pressure == "critical"
            assert "are available" in status.ranks[1].reason
            refused = refusal(ring)
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            sentence = str(refused.details())
            assert sentence.startswith("rank 1 (n1, 127.0.0.1:")
            assert "is short of memory (" in sentence
            assert sentence.endswith("no new request starts there, try again later")
            code, answer = complete(url)
            assert code == 429
            assert answer["error"]["message"].startswith("rank 1 (n1")
            assert not running.done(), "the request ended before the refusal could be seen"
            assert running.result() == greedy(model, PROMPT, 150)[0]
        trimmed = ring.wait_status(lambda s: s.ranks[1].node.memory.num_trims > 0)
        assert not is_admitting(trimmed, 1)
        share.write_text("0.9")
        ring.wait_status(lambda s: is_admitting(s, 1) and not s.ranks[1].reason)
        assert ring.tokens(PROMPT, 5) == greedy(model, PROMPT, 5)[0]
        assert complete(url)[0] == 200


def test_every_node_shows_predicted_and_measured_memory(tmp_path: Path, model: Path) -> None:
    with RingProcesses(
        tmp_path, model, LAYERS, with_api=True, concurrency=1, context=256, prefix_cache=False
    ) as ring:
        url = ring.wait_api()
        ring.tokens([1 + i % 250 for i in range(200)], 40)
        status = ring.wait_status(lambda s: all(is_over(r.node.num_sessions, r.node.memory) for r in s.ranks))
        plan = Plan.from_json(status.plan_json)
        told: list[dict[str, Any]] = []

        def has_heard() -> bool:  # the HTTP process a moment later
            told[:] = get(f"{url}/v1/cluster")["nodes"]
            return all(
                n["node"]["num_sessions"] == 0 and n["node"]["memory"]["peak_kv_bytes"] > 0 for n in told
            )

        wait_for(has_heard)
        nodes = told
    assert len(nodes) == len(plan.assignments) == 3
    for node, part in zip(nodes, plan.assignments, strict=True):
        predicted, now = node["predicted"], node["node"]
        weights, memory = predicted["weights"], now["memory"]
        for name in ("layers", "embed", "norm", "head", "other", "full_model"):
            assert now["footprint"][f"{name}_bytes"] == weights[f"{name}_bytes"], name
        parts = ("layers", "embed", "norm", "head", "other")
        assert sum(weights[f"{name}_bytes"] for name in parts) == part.weight_bytes
        assert predicted["kv_bytes"] == memory["peak_kv_bytes"] == part.kv_bytes
        assert 0 < memory["activation_bytes"] <= predicted["activation_bytes"] == part.activation_bytes
        assert predicted["budget_bytes"] == part.budget_bytes
        assert predicted["reserve_bytes"] == part.reserve_bytes
        assert status.ranks[part.rank].node.kv_bytes == 0  # all requests have ended
        assert 0 < now["active_bytes"] <= now["peak_bytes"] <= memory["rss_bytes"] <= now["peak_rss_bytes"]
        assert 0 < memory["available_bytes"] <= memory["total_bytes"]
        assert now["memory_pressure"] in ("normal", "warning", "critical")
        assert memory["memory_limit_bytes"] == 0  # on a CPU MLX's defaults hold
