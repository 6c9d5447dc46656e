"""The log of a whole ring: every node's lines at the head, of dead ones too, by HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

LOGS = "/v1/cluster/logs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[RingProcesses]:
    layers = [(0, 1), (1, 3), (3, 5)]
    with RingProcesses(tmp_path_factory.mktemp("ring"), model, layers, with_api=True) as one:
        one.wait_api()
        yield one


@pytest.fixture
def http(ring: RingProcesses) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{ring.api_port}", timeout=30.0) as client:
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
    assert "lost an edge" not in ring.log(1)
