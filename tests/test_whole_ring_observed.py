"""What a whole ring tells of itself: every node's log lines at the head, and the metrics of the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

LOGS = "/v1/cluster/logs"
KEY = "key-7b1c"
PROMPT = "zebra quagga"
BOARD = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "macrame.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[RingProcesses]:
    one = RingProcesses(
        tmp_path_factory.mktemp("ring"),
        model,
        [(0, 1), (1, 3), (3, 5)],
        with_api=True,
        env={"MACRAME_API_KEYS": KEY},
    )
    try:
        for rank, form in enumerate(("json", "text", "json")):
            one.start(rank, "--log-format", form, "--log-file", str(one.directory / f"own{rank}.log"))
        one.wait_api()
        yield one
    finally:
        one.__exit__(None, None, None)


@pytest.fixture
def http(ring: RingProcesses) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{ring.api_port}"
    with httpx.Client(base_url=url, timeout=30.0, headers=headers) as client:
        yield client


def lines_of(http: httpx.Client, rank: int, **query: Any) -> list[dict[str, Any]]:
    """A rank's lines, by HTTP."""
    reply = http.get(LOGS, params={"rank": rank, **query})
    assert reply.status_code == 200, reply.text
    (told,) = reply.json()["logs"]
    assert (told["rank"], told["name"]) == (rank, f"n{rank}")
    return told["lines"]  # type: ignore[no-any-return]


def wait_line(http: httpx.Client, rank: int, words: str) -> dict[str, Any]:
    """The first line of a rank with these words, as soon as it has come."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = [line for line in lines_of(http, rank) if words in line["message"]]
        return bool(found)

    wait_for(is_there, 5.0, f"{words} of rank {rank}")
    return found[0]


def test_the_head_has_the_lines_of_every_node(ring: RingProcesses, http: httpx.Client) -> None:
    for rank, layers in enumerate(("0:1", "1:3", "3:5")):
        line = wait_line(http, rank, f": layers {layers}")
        assert line.keys() == {"time_s", "level", "source", "message", "request_id"}
        assert (line["level"], line["request_id"]) == ("info", None)
        assert wait_line(http, rank, ": ready")["time_s"] >= line["time_s"]
    assert wait_line(http, 0, "HTTP API at http://127.0.0.1:")
    told = http.get(LOGS).json()["logs"]
    assert [one["rank"] for one in told] == [0, 1, 2]
    assert len(lines_of(http, 1, lines=2)) == 2
    assert lines_of(http, 1, lines=2) == lines_of(http, 1)[-2:]


@pytest.mark.parametrize(
    ("query", "message", "param"),
    [
        ("rank=3", "There is no rank 3 in this ring.", "rank"),
        ("rank=-1", "rank must be a whole number from 0 to 10000.", "rank"),
        ("rank=one", "rank must be a whole number from 0 to 10000.", "rank"),
        ("rank=", "rank must be a whole number from 0 to 10000.", "rank"),
        ("rank=%C2%B2", "rank must be a whole number from 0 to 10000.", "rank"),
        ("lines=0", "lines must be a whole number from 1 to 200.", "lines"),
        ("rank=1&lines=201", "lines must be a whole number from 1 to 200.", "lines"),
        ("lines=99999999999999999999", "lines must be a whole number from 1 to 200.", "lines"),
    ],
)
def test_questions_for_lines_that_are_refused(
    http: httpx.Client, query: str, message: str, param: str
) -> None:
    reply = http.get(f"{LOGS}?{query}")
    assert reply.status_code == 400
    assert (reply.json()["error"]["message"], reply.json()["error"]["param"]) == (message, param)


def test_statuses_do_not_carry_the_lines(ring: RingProcesses, http: httpx.Client) -> None:
    assert all(node["node"]["logs"] == [] for node in http.get("/v1/cluster").json()["nodes"])
    assert not ring.node_status(1).logs


def about(http: httpx.Client, request_id: str, count: int) -> dict[int, list[dict[str, Any]]]:
    """By rank, the lines about a request, once there are `count`."""
    found: dict[int, list[dict[str, Any]]] = {}

    def are_there() -> bool:
        for one in http.get(LOGS).json()["logs"]:
            found[one["rank"]] = [line for line in one["lines"] if line["request_id"] == request_id]
        return sum(map(len, found.values())) >= count

    wait_for(are_there, 5.0, f"{count} lines about {request_id}")
    return found


def complete(http: httpx.Client, request_id: str, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, **fields}
    return http.post("/v1/completions", json=body, headers={"x-request-id": request_id})


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_requests_own_id_is_on_every_node(http: httpx.Client, is_streamed: bool) -> None:
    wanted = f"mine-{is_streamed}"
    reply = complete(http, wanted, stream=is_streamed)
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, wanted)
    found = about(http, wanted, 8)
    number = re.fullmatch(r"session (\d+) opened: .*", found[1][0]["message"])
    assert number is not None
    for rank in range(3):
        stage = [line["message"] for line in found[rank] if line["source"] == "cluster.open_sessions"]
        assert stage == [
            f"session {number[1]} opened: 12 tokens of prompt, 6 of answer at most",
            f"session {number[1]} kept at position 17",
        ]
    (head,) = [line for line in found[0] if line["source"] == "cluster.request_log"]
    assert re.fullmatch(
        r"finished \(length\), 12 prompt tokens, 6 completion tokens, waited [0-9.]+ s, "
        r"first token [0-9.]+ s later, [0-9.]+ s in all",
        head["message"],
    )
    (access,) = [line for line in found[0] if line["source"] == "cluster.api.access"]
    assert re.fullmatch(
        r"POST /v1/completions 200, [0-9.]+ s, 12 prompt and 6 completion tokens, "
        r"first token after [0-9.]+ s",
        access["message"],
    )


def test_a_request_without_an_id_gets_one(http: httpx.Client) -> None:
    ids = [http.get(path).headers["x-request-id"] for path in ("/health", "/nothing", "/v1/models")]
    ids.append(complete(http, "two words").headers["x-request-id"])
    ids.append(complete(http, "y" * 200, max_tokens=0).headers["x-request-id"])
    ids.append(httpx.get(f"{http.base_url}/v1/models").headers["x-request-id"])  # 401
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    assert about(http, ids[1], 1)[0][0]["message"].startswith("GET /nothing 404, ")
    assert about(http, ids[4], 1)[0][0]["message"].startswith("POST /v1/completions 400, ")
    assert about(http, ids[5], 1)[0][0]["message"].startswith("GET /v1/models 401, ")
    assert len(about(http, ids[3], 8)[2]) == 2


def test_two_requests_of_one_id_are_both_answered(http: httpx.Client) -> None:
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: complete(http, "twice"), range(2)))
    assert [reply.status_code for reply in replies] == [200, 200]
    assert len(about(http, "twice", 16)[1]) == 4


def test_what_the_head_refuses_is_told_to_the_client_alone(ring: RingProcesses, http: httpx.Client) -> None:
    with pytest.raises(grpc.RpcError, match="token id 4999"):
        ring.generate([4999], 2)
    line = wait_line(http, 0, "refused: it can never run, 1 prompt tokens, ")
    assert line["source"] == "cluster.request_log"


def test_no_log_has_a_prompt_an_answer_a_token_or_a_key(ring: RingProcesses, http: httpx.Client) -> None:
    reply = complete(http, "quiet", return_token_ids=True, logprobs=1).json()
    wrong = {"authorization": "Bearer key-wrong"}
    httpx.get(f"{http.base_url}/v1/models?key=key-in-a-query", headers=wrong)
    http.post("/v1/chat/completions", json={"messages": [{"role": PROMPT, "content": "x"}]})
    http.post("/v1/completions", content=PROMPT, headers={"content-type": "application/json"})
    about(http, "quiet", 8)
    texts = [http.get(LOGS).text]
    texts += [ring.log(rank) + (ring.directory / f"own{rank}.log").read_text() for rank in range(3)]
    secrets = [KEY, "key-wrong", "key-in-a-query", PROMPT, "quagga", reply["choices"][0]["text"]]
    for text in texts:
        assert "quiet" in text
        for secret in secrets:
            assert secret not in text


def test_each_line_of_a_file_can_be_read(ring: RingProcesses, http: httpx.Client) -> None:
    complete(http, "written")
    about(http, "written", 8)
    own = [(ring.directory / f"own{rank}.log").read_text().splitlines() for rank in range(3)]
    access = [line for line in map(json.loads, own[0]) if "path" in line and line["request_id"] == "written"]
    assert len(access) == 1
    assert access[0].keys() == {
        *("time", "level", "rank", "node", "source", "request_id", "message", "method", "path", "status"),
        *("duration_s", "prompt_tokens", "completion_tokens", "first_token_s"),
    }
    assert (access[0]["path"], access[0]["status"], access[0]["node"]) == ("/v1/completions", 200, "n0")
    assert 0 < access[0]["first_token_s"] <= access[0]["duration_s"]
    opened = [line for line in own[1] if " n1 cluster.open_sessions written session " in line]
    assert len(opened) == 2
    assert all(re.match(r"20\d\d-\d\d-\d\dT[0-9:.]{12}Z [A-Z]+ n1 |    ", line) for line in own[1][1:])
    assert ring.log(2).splitlines() == own[2]  # both are JSON, and nothing else is written


def targets() -> list[tuple[str, str]]:
    """Each question of the dashboard: its expression and the legend."""
    panels = json.loads(BOARD.read_text())["panels"]
    return [
        (one["expr"], one["legendFormat"])
        for panel in panels
        if panel["type"] != "row"
        for one in panel["targets"]
    ]


def test_every_metric_and_label_of_the_dashboard_is_on_a_real_rings_page(http: httpx.Client) -> None:
    complete(http, "measured")
    labels_of: dict[str, set[str]] = {}

    def ask() -> bool:
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                labels_of.setdefault(sample.name, set()).update(sample.labels)
        return "macrame_hop_seconds" in labels_of  # once each edge has sent a heartbeat

    wait_for(ask)
    asked = targets()
    assert len(asked) > 30
    for expression, legend in asked:
        names = re.findall(r"\bmacrame_[a-z_]+\b", expression)
        assert names
        assert set(names) <= labels_of.keys(), expression
        known = set().union(*(labels_of[name] for name in names)) | {"job"}
        used = re.findall(r"([a-z_]+)=~?\"", expression) + re.findall(r"\{\{(\w+)\}\}", legend)
        used += re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))
        assert set(used) <= known, expression
        assert expression.count("(") == expression.count(")")


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    board = json.loads(BOARD.read_text())
    assert (board["uid"], board["title"]) == ("macrame", "macrame")
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "job"}
    ids, taken = [panel["id"] for panel in board["panels"]], set()
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_two_clients_paths_are_one_label(http: httpx.Client) -> None:
    for number in range(5):
        http.get(f"/nothing/{number}")
        http.get(f"/v1/models/{number}")
    paths = {
        sample.labels["path"]
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name == "macrame_http_requests_total"
    }
    assert "other" in paths
    assert not any("nothing" in path or "models/" in path for path in paths)


def test_a_dead_nodes_last_words_stay_and_its_next_life_adds_to_them(
    ring: RingProcesses, http: httpx.Client
) -> None:
    """The last test of the ring: it ends one node by a signal, and kills it in its next life."""
    ring.processes[2].terminate()
    assert ring.processes[2].wait(10.0) == 0
    wait_line(http, 0, "degraded: ")
    assert wait_line(http, 2, "stopping: SIGTERM")["level"] == "info"
    before = lines_of(http, 2)
    ring.start(2)
    ring.wait_ok()
    wait_for(lambda: lines_of(http, 2)[-1]["message"].endswith(": ready"))
    ring.kill(2)
    wait_line(http, 0, "degraded: ")
    assert lines_of(http, 2)[: len(before)] == before
    assert lines_of(http, 2)[-1]["message"].endswith(": ready")
    assert wait_line(http, 1, "lost an edge: ")["level"] == "warning"
