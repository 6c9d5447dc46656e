"""`macrame links` against real nodes on loopback, through relays whose delay and rate are known."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.links import Measurement
from deploy.links import _own_plan, main
from planner.plan import Plan
from tests.node_process import node, write_cluster
from tests.relay import Relay, Shape
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

MBIT = 1e6 / 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


@pytest.mark.long
def test_a_ring_that_waits_for_a_node_measures_what_is_there_and_writes_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = RingProcesses(tmp_path, model, [(0, 2), (2, 4), (4, 5)])
    with (
        Relay(("127.0.0.1", ring.ports[1]), to_target=Shape(10, 200 * MBIT), to_client=Shape(10)) as there,
        Relay(("127.0.0.1", ring.ports[0]), to_target=Shape(25, 50 * MBIT), to_client=Shape(25)) as back,
    ):
        ring.faults = {0: f"edges_via=1@{there.port}", 1: f"edges_via=0@{back.port}"}
        try:
            for rank in (0, 1):
                ring.start(rank)
            for rank in (0, 1):
                ring.wait_listening(rank)
            assert main(["--config", str(ring.config_path), "--json", "--write"]) == 4
        finally:
            assert set(ring.stop().values()) == {0}
    out, err = capsys.readouterr()
    found = json.loads(out)
    (link,) = found["links"]
    assert link["between"] == ["n0", "n1"]
    assert 25 <= link["latency_ms"] < 70
    assert link["bandwidth_gbit_s"] == pytest.approx(0.05, rel=0.4)
    first, *others = found["pairs"]
    ways = [direction["paths"][0] for direction in first["directions"]]
    assert [way["kind"] for way in ways] == ["loopback", "loopback"]
    assert 20 <= ways[0]["round_trip_p50_ms"] < 70
    assert ways[0]["bandwidth_gbit_s"] == pytest.approx(0.2, rel=0.4)
    nobody = f"nobody listens at 127.0.0.1:{ring.ports[2]}; is the node running there?"
    assert [pair["reasons"] for pair in others] == [
        [f"{n} to n2: {nobody}", f"n2 to {n}: {nobody}"] for n in ("n0", "n1")
    ]
    assert found["predicted"]["measured"]["decode_tok_s"] < found["predicted"]["assumed"]["decode_tok_s"] / 2
    assert json.loads(ring.config_path.read_text()) == ring.config | {"links": [link]}
    assert "n0 measures its way to n1 at 127.0.0.1" in err
    assert "copy it to all nodes and restart them" in err


def test_the_plan_without_a_ring_has_the_draft_model(tmp_path: Path, model: Path) -> None:
    draft = shutil.copytree(model, tmp_path / "draft")
    speculation = {"method": "draft", "draft_model": str(draft)}
    path = write_cluster(tmp_path, model, node(), node(), speculation=speculation)
    plan, made_from = _own_plan(load_config(path), Measurement(()))
    assert isinstance(plan, Plan)
    assert plan.drafter is not None
    assert plan.drafter == made_from.nodes[0].drafter
    assert made_from.nodes[1].drafter is None


@pytest.mark.long
def test_a_serving_ring_is_measured_when_it_rests(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = RingProcesses(tmp_path, model, [(0, 3), (3, 5)], faults={1: "step_delay_ms=100"})
    config = str(ring.config_path)
    with ring:
        ring.wait_ok()
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.extend(ring.tokens([1, 2, 3], 60)))
        asking.start()
        ring.wait_status(lambda status: all(rank.node.num_sessions for rank in status.ranks))
        assert main(["--config", config]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            "macrame links: requests are running on n0 (1), n1 (1), which a measurement would disturb; wait "
            "until they are done, or measure with --anyway"
        )
        assert main(["--config", config, "--anyway"]) == 0
        asking.join()
        assert len(answers) == 60
        ring.wait_status(lambda status: not any(rank.node.num_sessions for rank in status.ranks))
        assert main(["--config", config]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[2].startswith("n0 - n1  loopback lo  127.0.0.1")
        assert out[3].startswith("predicted with the measured links: ")
        edge = ring.node_status(0).edges[0]
        assert (edge.to_rank, edge.kind, edge.is_up) == (1, "loopback", True)


def test_one_node_has_no_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"model": "x/y", "nodes": [{"host": "127.0.0.1"}]}))
    assert main(["--config", str(path)]) == 3
    assert capsys.readouterr().err == f"macrame links: {path} has one node: there is no link to measure\n"


def test_nobody_there_is_exit_code_4(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring = RingProcesses(tmp_path, model, [(0, 3), (3, 5)])
    assert main(["--config", str(ring.config_path)]) == 4
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"n0 - n1 could not be measured: n0 to n1: nobody listens at 127.0.0.1:{ring.ports[0]}; is the node "
        "running there?"
    )
    assert out[-1] == "no prediction: no link was measured"
