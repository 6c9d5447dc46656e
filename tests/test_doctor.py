"""The command `macrame doctor`: what it prints, its exit codes, and what several nodes' answers mean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster import diagnosis_checks, diagnosis_service, versions
from cluster.config import NodeConfig, load_config
from cluster.control import ControlService
from cluster.diagnosis import Finding, Subject, fine, skipped
from cluster.diagnosis_sentences import explain
from cluster.node import Node
from cluster.probe import this_machine
from cluster.rpc import connect, make_server
from deploy import doctor_ring
from deploy.doctor import main
from deploy.doctor_compare import Clock, NodeAnswer, compare_nodes, ring_findings
from deploy.doctor_report import HERE, Report, as_json, as_text, gather
from proto import control_pb2, control_pb2_grpc, head_pb2
from tests.node_process import node, write_cluster
from tests.ring_processes import free_ports
from tests.test_diagnosis import only, wrong

ROOT = Path(__file__).resolve().parent.parent
FULL = Finding("disk", "error", "the disk is full", "nothing can be written", "rm -r old")
SLOW = Finding("links", "warning", "it is Wi-Fi", "slow", "macrame links")


def quick(_subject: Subject) -> list[Finding]:
    """Stands for all checks, each of which has tests of its own."""
    return [fine("disk", "room"), skipped("clock", "alone")]


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis_checks, "CHECKS", (quick,))


# -- what is printed --------------------------------------------------------------------------------------
def test_the_same_finding_of_several_machines_is_told_once() -> None:
    told = gather([(HERE, [fine("disk", "room"), SLOW]), ("n1", [FULL, SLOW]), ("n2", [FULL])])
    assert [(one.finding.status, one.where) for one in told] == [
        ("error", ("n1", "n2")),
        ("warning", (HERE, "n1")),
        ("fine", (HERE,)),
    ]
    assert as_text(Report(told)).splitlines() == [
        "ERROR disk on n1, n2: the disk is full",
        "  why:  nothing can be written",
        "  mend: rm -r old",
        "",
        f"WARNING links on {HERE}, n1: it is Wi-Fi",
        "  why:  slow",
        "  mend: macrame links",
        "",
        "fine:",
        "  disk  room",
        "",
        "1 error and 1 warning; 1 fine, 0 not checked",
    ]


def test_json_has_findings_what_is_fine_and_what_was_not_checked() -> None:
    told = gather([(HERE, [FULL, fine("ports", "free"), skipped("clock", "alone")])])
    assert json.loads(as_json(Report(told))) == {
        "ok": False,
        "findings": [
            {
                "severity": "error",
                "check": "disk",
                "where": [HERE],
                "what": "the disk is full",
                "why": "nothing can be written",
                "mend": "rm -r old",
            }
        ],
        "fine": [{"check": "ports", "where": [HERE], "what": "free"}],
        "not_checked": [{"check": "clock", "where": [HERE], "reason": "alone"}],
        "nodes": [],
    }


@pytest.mark.usefixtures("few_checks")
def test_exit_code_0_where_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing wrong was found; 1 fine, 1 not checked"


@pytest.mark.usefixtures("few_checks")
def test_a_config_that_cannot_be_used_does_not_hide_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"model": "x/y", "nodes": [{"hots": "a"}]}')
    for arguments in ([], ["--all"]):
        assert main(["--config", str(path), "--json", *arguments]) == 3
        found = json.loads(capsys.readouterr().out)
        assert "did you mean" in found["findings"][0]["what"] or "hots" in found["findings"][0]["what"]
        assert [one["check"] for one in found["fine"]] == ["disk"]


def test_what_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--all"], "add --config"),
        (["--all", "--config", "c", "--explain", "x"], ""),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 3
        assert message in capsys.readouterr().err


# -- known sentences --------------------------------------------------------------------------------------
SENTENCES = {
    "mini2.local:50051 cannot be reached: No route to host (errno 65)": "LaunchDaemons",
    "failed to connect to all addresses; connect: No route to host (65)": "Local",
    "run_node: another package named 'proto' in /x hides macrame's; install": "another package",
    "nobody listens at 10.0.0.2:50051; is the node running there?": "no node runs on that port",
    "port 50051 of mini1 is in use by another process; stop it": "another program",
    "the cluster token is missing or wrong; give every node": "different tokens",
    "mini2 runs with another config (digest 1, the head's is 2)": "was changed on one machine",
    "certs/n0.pem expired on 2026-01-02: make new ones": "time is over",
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)": "no memory left",
    "node 1 was killed by signal 9; the end of its log:": "system ended the process",
    "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": "about 5 s",
    "OSError: [Errno 28] No space left on device": "disk",
    "[Errno 8] nodename nor servname provided, or not known": "Bonjour",
    "10.0.0.2:50051 has been silent for 3 s": "stands still",
    "ModuleNotFoundError: No module named 'mlx'": "a package is missing",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_known_sentence_is_explained(sentence: str) -> None:
    (found,) = explain(f"2026-11-21 12:00:00 WARNING x: {sentence}\n")
    assert sentence in found.what
    assert SENTENCES[sentence] in found.why + found.mend


def test_a_log_is_explained_sentence_by_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = "a: No route to host\nall is well\nb: No route to host\nNo space left on device\n"
    assert [found.what for found in explain(log)] == ["b: No route to host", "No space left on device"]
    assert main(["--explain", log]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "b: No route to host\n  why:  on a Mac: macOS gives 'No route to host' (errno 65) to"
    )
    assert main(["--explain", "all is well"]) == 1
    assert capsys.readouterr().out == "macrame doctor knows no sentence in that text\n"


# -- a package that hides ours ----------------------------------------------------------------------------
def test_another_proto_is_found_before_it_can_break_the_doctor(tmp_path: Path) -> None:
    """A real process in a folder that has a package of that name, as a checkout of another project would."""
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto" / "__init__.py").write_text("raise ImportError('not macrame')")
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "doctor", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    (first,) = [one for one in found["findings"] if one["check"] == "packages"]
    assert first["what"] == f"another package named 'proto' in {tmp_path / 'proto'} hides macrame's"
    assert "python3 -m venv .venv" in first["mend"]
    assert found["not_checked"][0]["reason"] == "needs macrame's own packages; mend those first"


# -- several nodes ----------------------------------------------------------------------------------------
def answer(rank: int, *, offset_s: float = 0.0, **values: Any) -> NodeAnswer:
    """A node that is like the others but for `values`."""
    told = {
        "python_version": "3.12.3",
        "macrame_version": "0.1.0",
        "mlx_version": "0.32.4",
        "mlx_lm_version": "0.32.2",
        "model_digest": "m",
        "platform": "macOS-26.1-arm64",
        **values,
    }
    there = NodeConfig(rank, f"n{rank}", f"n{rank}.local")
    reply = control_pb2.DiagnoseReply(**{"config_digest": CONFIG.digest, **told})
    return NodeAnswer(there, reply=reply, clock=Clock(offset_s, 0.002))


CONFIG_PATH = Path(__file__).parent.parent / "deploy" / "demo" / "cluster.json"
CONFIG = load_config(CONFIG_PATH)


def compared(*answers: NodeAnswer) -> list[Finding]:
    return compare_nodes(CONFIG, answers)


def test_nodes_that_are_alike() -> None:
    found = compared(answer(0), answer(1, python_version="3.12.9"), answer(2, offset_s=0.3))
    assert not wrong(found)
    assert [one.what for one in found if one.check == "clock"] == [
        "all within 0.300 s of each other's middle (+-0.002 s)"
    ]


@pytest.mark.parametrize(
    ("values", "status", "what"),
    [
        ({"mlx_lm_version": "0.31.0"}, "error", "mlx-lm differs: 0.32.2 on n0, 0.31.0 on n1, 0.32.2 on n2"),
        ({"mlx_version": "0.31.1"}, "warning", "mlx differs: 0.32.4 on n0, 0.31.1 on n1, 0.32.4 on n2"),
        ({"macrame_version": "0.2.0"}, "error", "macrame differs: 0.1.0 on n0, 0.2.0 on n1, 0.1.0 on n2"),
        ({"python_version": "3.13.0"}, "warning", "Python differs: 3.12 on n0, 3.13 on n1, 3.12 on n2"),
        ({"model_digest": "x"}, "error", "the model's files differ: digest m on n0, x on n1, m on n2"),
        (
            {"config_digest": "0123"},
            "error",
            f"n1 (0123) runs with another config than {CONFIG_PATH} ({CONFIG.digest})",
        ),
        (
            {"offset_s": 90.0},
            "warning",
            "the clock of n1 is 90.0 s ahead of the others' (+-0.002 s)",
        ),
        (
            {"offset_s": -7200.0},
            "error",
            "the clock of n1 is 7200.0 s behind the others' (+-0.002 s)",
        ),
    ],
)
def test_one_node_that_differs(values: dict[str, Any], status: str, what: str) -> None:
    found = only(compared(answer(0), answer(1, **values), answer(2)))
    assert (found.status, found.what) == (status, what)


def test_the_clock_of_this_machine() -> None:
    found = only(compared(*(answer(rank, offset_s=-30.0) for rank in range(3))))
    assert found.what == "this machine's clock is 30.0 s ahead of the nodes'"


def test_nodes_that_do_not_answer() -> None:
    away = [
        NodeAnswer(NodeConfig(0, "n0", "mini1.local"), error=ConnectionRefusedError()),
        NodeAnswer(NodeConfig(1, "n1", "mini2.local"), error=TimeoutError()),
        NodeAnswer(
            NodeConfig(2, "n2", "mini3.local"), trouble="mini3.local:50051 does not answer in time; is"
        ),
    ]
    *found, last = compared(*away)
    assert [one.what for one in found] == [
        "n0 does not answer: nobody listens at mini1.local:50051",
        "n1 at mini2.local:50051 does not answer within 3 s",
        "n2 does not answer: mini3.local:50051 does not answer in time",
    ]
    assert found[0].mend == f"run_node --rank 0 --config {CONFIG_PATH}    # on mini1.local"
    assert found[2].mend.startswith("ps -eo pid,stat,args | grep run_node ")
    assert (last.status, last.what) == ("skipped", "no node answered, so none was compared with another")


def test_an_older_macrame_there() -> None:
    older = control_pb2.NodeProfile(macrame_version="0.0.9", config_digest=CONFIG.digest)
    found = wrong(compared(answer(0), NodeAnswer(NodeConfig(1, "n1", "h"), older=older)))
    assert found[0].what == "n1 runs macrame 0.0.9, which cannot look at itself for others"
    assert found[1].what == "macrame differs: 0.1.0 on n0, 0.0.9 on n1"


def test_what_the_head_says_of_the_ring() -> None:
    waiting = head_pb2.ClusterStatus(status="degraded", reason="n1 is away")
    (found,) = ring_findings(CONFIG, waiting)
    assert found.what == "the ring does not serve (degraded): n1 is away"
    (unknown,) = ring_findings(CONFIG, None)
    assert unknown.status == "skipped"
    edge = control_pb2.EdgeStatus(to_rank=1, address="10.0.0.2:5", interface="en0", kind="wifi", is_up=True)
    rank = head_pb2.RankStatus(
        rank=0,
        name="n0",
        node=control_pb2.NodeStatus(
            edges=[edge],
            memory_pressure="critical",
            memory=control_pb2.MemoryStatus(available_bytes=10**9, total_bytes=64 * 10**9),
        ),
    )
    wifi, memory = wrong(ring_findings(CONFIG, head_pb2.ClusterStatus(status="ok", ranks=[rank])))
    assert wifi.what == "n0 sends to 1 by Wi-Fi (en0, 10.0.0.2:5)"
    assert memory.what == "n0 is short of memory (critical): 1.00 GB of 64.0 GB are available"


# -- over gRPC --------------------------------------------------------------------------------------------
@contextmanager
def served(path: Path, rank: int, token: str) -> Iterator[ControlService]:
    """A node's control service at its address, without a ring."""
    config = load_config(path)
    one = Node(config, rank, credentials=token, import_base_rss_bytes=0)
    service = ControlService(one, this_machine())
    add: Callable[[grpc.Server], None] = lambda server: (  # noqa: E731
        control_pb2_grpc.add_ControlServicer_to_server(service, server)
    )
    server, _ = make_server(config.nodes[rank].address, [add], token, max_workers=8)
    server.start()
    try:
        yield service
    finally:
        service.close()
        server.stop(0).wait()
        one.close(1.0)


@pytest.mark.usefixtures("few_checks")
def test_all_asks_every_node_with_the_clusters_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MACRAME_TOKEN", "right")
    nodes = [node(name=f"n{rank}", port=port) for rank, port in enumerate(free_ports(3))]
    path = write_cluster(tmp_path, "x/y", *nodes)
    with ExitStack() as stack:
        stack.enter_context(served(path, 0, "right"))
        stack.enter_context(served(path, 1, "other"))
        assert main(["--all", "--config", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [node["answers"] for node in found["nodes"]] == [True, False, False]
    assert found["nodes"][0]["mlx"] == versions.mlx_version()
    assert abs(found["nodes"][0]["clock_offset_s"]) < 1.0
    assert [one["what"] for one in found["findings"]] == [
        f"n1 does not answer: 127.0.0.1:{nodes[1]['port']} has another token",
        f"n2 does not answer: nobody listens at 127.0.0.1:{nodes[2]['port']}",
    ]
    assert {"check": "disk", "where": [HERE, "n0"], "what": "room"} in found["fine"]


def test_one_diagnosis_at_a_time_and_the_clock_at_any(tmp_path: Path) -> None:
    path = write_cluster(tmp_path, "x/y", node(name="n0"))
    with served(path, 0, "t") as service, connect(load_config(path).nodes[0].address, "t") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        with service._diagnoses._lock:
            assert doctor_ring.measure_clock(stub).uncertainty_s < 5.0
            with pytest.raises(grpc.RpcError) as raised:
                stub.Diagnose(control_pb2.DiagnoseRequest(), timeout=20.0)
        assert isinstance(raised.value, grpc.Call)
        assert raised.value.details() == diagnosis_service.BUSY
