"""`macrame plan --from-running` against what a ring's API says, good and bad."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import dry_run
from cluster.api.status import to_plain
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_UNREACHABLE, EXIT_USAGE
from deploy import cli
from planner.measured import scaled
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from proto import head_pb2
from tests.api_server import Served
from tests.ring_processes import free_ports
from tests.test_measured import times_of
from tests.test_rebalance import plan_of, three

FORCED = ((0, 5), (5, 9), None)
KEYS = {
    *("verdict", "advice", "objective", "gain", "gain_low", "gain_high", "stages", "hops", "present"),
    *("best", "layers", "moves", "unmeasured_nodes", "freed_nodes", "untested"),
}


def answers_of(planned: PlannedFrom, plan: Plan, factors: Mapping[int, float]) -> dict[str, Any]:
    """/v1/cluster and /v1/cluster/planning of a ring whose nodes take so many times as long as planned."""
    status = head_pb2.ClusterStatus(context=plan.context, max_active=plan.concurrency)
    for node in planned.nodes:
        rank = status.ranks.add(rank=node.rank, name=node.name, state="ready")
        part = next((part for part in plan.assignments if part.rank == node.rank), None)
        if part is None:
            continue
        times = times_of(part, scaled(node.speeds, factors[node.rank]), seed=node.rank)
        stats = rank.node.stats
        stats.uptime_ms = times.uptime_ms
        for key in ("decode_ms", "decode_position", "chunk_ms", "chunk_tokens", "chunk_position"):
            getattr(stats, key).extend(getattr(times, key))
        stats.recent_hop_ms.extend([0.2, 0.3])
        stats.recent_hop_rank.extend([(node.rank + 1) % 2] * 2)
    plain = to_plain(status)
    nodes = plain.pop("ranks")
    cluster = plain | {
        "model": "made-up",
        "status": "ok",
        "reason": "",
        "plan": plan.as_dict(),
        "nodes": nodes,
    }
    return {
        "/v1/cluster": cluster | {"plan": plan.as_dict()},
        "/v1/cluster/planning": {"config_digest": "0", "planning": json.loads(planned.to_json())},
    }


@contextmanager
def api(answers: Mapping[str, Any]) -> Iterator[str]:
    """An API that says this, by path; the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.get(self.path, {"error": {"message": "there is none"}})).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = cli.main(["plan", "--from-running", *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def slow() -> dict[str, Any]:
    """Rank 0 takes four times as long as planned."""
    planned = three(0.9, 0.9, 0.9, layers=FORCED)
    return answers_of(planned, plan_of(planned), {0: 4.0, 1: 1.0})


def test_the_advice_is_a_text_and_an_object(slow: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with api(slow) as url:
        code, text, said = run(capsys, "--url", url)
        assert (code, said) == (EXIT_OK, "")
        code, out, said = run(capsys, "--url", url, "--json")
    assert (code, said) == (EXIT_OK, "")
    data = json.loads(out)
    assert set(data) == KEYS
    assert data["verdict"] == "replan"
    assert data["best"]["predicted"]["decode_tok_s"] > data["present"]["predicted"]["decode_tok_s"]
    assert data["layers"] == {a["node"]: f"{a['start']}:{a['stop']}" for a in data["best"]["assignments"]}
    assert data["stages"][0]["factor"] == pytest.approx(4, rel=0.02)
    assert data["freed_nodes"] == ["n0", "n1"]
    assert data["advice"] in text
    assert "tokens a second of one user would go from" in text
    assert 'set these layers in the cluster file ("layers" of each node, and none at the others)' in text
    assert "the present plan by these measurements: " in text
    assert "the best plan by these measurements: " in text
    assert "note: the cluster file forces layers of n0, n1; --keep-layers keeps them" in text
    assert f"{data['gain']:.0%} ({data['gain_low']:.0%} to {data['gain_high']:.0%} by the spread" in text


def test_forced_layers_are_kept_if_asked(slow: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with api(slow) as url:
        code, text, _ = run(capsys, "--url", url, "--keep-layers")
    assert code == EXIT_OK
    assert "the present plan is the best of those with the layers that the cluster file forces" in text


def test_a_ring_as_planned_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    planned = three(0.7, 0.7, 0.7)
    with api(answers_of(planned, plan_of(planned), dict.fromkeys(range(3), 1.3))) as url:
        code, text, _ = run(capsys, "--url", url)
        _, out, _ = run(capsys, "--url", url, "--json", "--objective", "throughput")
    assert code == EXIT_OK
    assert ": leave it\n" in text
    assert "the best plan by" not in text
    assert "note: n2 own no layers and measured nothing" in text
    data = json.loads(out)
    assert (data["verdict"], data["objective"], data["unmeasured_nodes"]) == ("leave", "throughput", ["n2"])


def test_what_is_within_the_spread_is_called_uncertain(capsys: pytest.CaptureFixture[str]) -> None:
    planned = three(0.7, 0.7, 0.7, layers=FORCED)
    answers = answers_of(planned, plan_of(planned), {0: 1.4, 1: 1.0})
    stats = answers["/v1/cluster"]["nodes"][0]["node"]["stats"]
    stats["decode_ms"] = [ms * (0.4 if i % 2 else 1.6) for i, ms in enumerate(stats["decode_ms"])]
    with api(answers) as url:
        code, text, _ = run(capsys, "--url", url)
    assert code == EXIT_OK
    assert "\nuncertain: tokens a second of one user would go from" in text
    assert "so generate more tokens and ask again before you set these layers: " in text


def test_steps_without_their_rows_are_refused(
    slow: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    slow["/v1/cluster"]["nodes"][1]["node"]["stats"]["decode_rows"] = [1, 2]
    with api(slow) as url:
        code, out, said = run(capsys, "--url", url)
    assert (code, out) == (EXIT_ERROR, "")
    assert "rank 1 tells 64 decode steps without their rows" in said


def test_too_few_steps_say_how_many_tokens_to_generate(
    slow: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stats = slow["/v1/cluster"]["nodes"][1]["node"]["stats"]
    for key in ("decode_ms", "decode_position"):
        stats[key] = stats[key][:5]
    with api(slow) as url:
        code, out, said = run(capsys, "--url", url)
    assert (code, out) == (EXIT_ERROR, "")
    assert said == (
        "macrame plan --from-running: stage 1 (n1, layers 5:9) has made 5 of the 32 decode steps that are "
        f"needed: let the ring generate 27 more tokens first, such as with 'macrame bench --url {url} "
        "--concurrency 1', and ask again\n"
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0.0] * 40, "stage 0 (n0, layers 0:5) reports a decode step of 0 ms: its clock does not run"),
        ([2.5] * 40, "stage 0 (n0, layers 0:5) reports 2.5 ms for every decode step"),
        ([None] * 40, "stage 0 (n0, layers 0:5) reports a decode step of nan ms"),
        (["x"] * 40, "says what cannot be read: could not convert string to float: 'x'"),
    ],
)
def test_implausible_times_are_refused(
    slow: dict[str, Any], capsys: pytest.CaptureFixture[str], steps: list[Any], message: str
) -> None:
    slow["/v1/cluster"]["nodes"][0]["node"]["stats"] |= {"decode_ms": steps, "decode_position": [100] * 40}
    with api(slow) as url:
        code, out, said = run(capsys, "--url", url)
    assert (code, out) == (EXIT_ERROR, "")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("state", "expected"), [("unreachable", EXIT_UNREACHABLE), ("loading", EXIT_ERROR)])
def test_a_ring_that_does_not_serve_measures_nothing(
    slow: dict[str, Any], capsys: pytest.CaptureFixture[str], state: str, expected: int
) -> None:
    slow["/v1/cluster"] |= {"status": "degraded", "reason": "rank 1 (n1) is gone"}
    slow["/v1/cluster"]["nodes"][1]["state"] = state
    with api(slow) as url:
        code, _, said = run(capsys, "--url", url)
    assert code == expected
    assert "does not serve, so nothing can be measured: rank 1 (n1) is gone" in said


def test_other_answers_are_one_sentence(slow: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    code, _, said = run(capsys, "--url", f"http://127.0.0.1:{port}")
    assert (code, said.count("\n")) == (EXIT_UNREACHABLE, 1)
    assert "is the ring running?" in said
    with api({"/v1/cluster": {}}) as url:  # some other server
        code, _, said = run(capsys, "--url", url)
    assert (code, said.count("\n")) == (EXIT_ERROR, 1)
    assert "is not macrame's API; give the head's with --url or --config" in said
    planning = slow.pop("/v1/cluster/planning")
    with api(slow) as url:
        code, _, said = run(capsys, "--url", url)
    assert (code, said.count("\n")) == (EXIT_USAGE, 1)
    planning["planning"]["nodes"][0]["colour"] = "red"
    with api(slow | {"/v1/cluster/planning": planning}) as url:
        code, _, said = run(capsys, "--url", url)
    assert code == EXIT_ERROR
    assert "planning.nodes[0].colour is not known here: the ring runs another version of macrame" in said


def test_a_changed_cluster_file_is_said(
    slow: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    with api(slow) as url:
        port = int(url.rpartition(":")[2])
        nodes = [{"host": "127.0.0.1", "memory_gb": 16}]
        path.write_text(json.dumps({"model": "m", "nodes": nodes, "api": {"port": port}}))
        code, text, _ = run(capsys, "--config", str(path))
        assert code == EXIT_OK
        assert f"note: {path} is not what the ring was started with" in text
        _, out, said = run(capsys, "--config", str(path), "--json")
    assert set(json.loads(out)) == KEYS
    assert "is not what the ring was started with" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "ftp://x"], "--url ftp://x is not of the form http://127.0.0.1:8080"),
        (["--config", "/nowhere.json"], "/nowhere.json does not exist"),
        (["--url", "http://x", "--config", "c"], "not allowed with argument"),
        (["--objective", "speed"], "invalid choice: 'speed'"),
        (["--context", "99"], "unrecognized arguments: --context 99"),
        (["--config"], "expected one argument"),
    ],
)
def test_usage_errors_end_with_3(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    try:
        code = cli.main(["plan", "--from-running", *flags])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_without_the_flag_it_is_plan_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    told = capsys.readouterr().out
    assert told.startswith("usage: plan-dry-run")
    assert "--from-running" in told
    assert cli.main(["plan", "--config", "/nowhere.json"]) == EXIT_USAGE
    assert "plan-dry-run: /nowhere.json does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        dry_run.main(["--from-running"])
    assert caught.value.code == EXIT_USAGE


def test_speeds_of_the_ring_are_used_and_not_those_of_the_table(
    slow: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that planned with measured speeds sends them: the factor is against those."""
    planned = PlannedFrom.from_plain(slow["/v1/cluster/planning"]["planning"])
    nodes = (replace(planned.nodes[0], measured=scaled(planned.nodes[0].speeds, 4.0)), *planned.nodes[1:])
    slow["/v1/cluster/planning"]["planning"] = json.loads(replace(planned, nodes=nodes).to_json())
    with api(slow) as url:
        _, out, _ = run(capsys, "--url", url, "--json")
    assert json.loads(out)["stages"][0]["factor"] == pytest.approx(1, rel=0.02)


def test_the_api_hands_out_what_the_head_planned_from(served: Served) -> None:
    reply = served.http.get("/v1/cluster/planning")
    assert reply.status_code == 503
    assert reply.json()["error"]["message"].startswith("the head has no plan yet")
    planned = three(0.7, 0.7, 0.7)
    served.ring.head.planned_from = head_pb2.PlanningReply(
        planning_json=planned.to_json(), config_digest="abc"
    )
    data = served.http.get("/v1/cluster/planning").json()
    assert data["config_digest"] == "abc"
    assert PlannedFrom.from_plain(data["planning"]) == planned
