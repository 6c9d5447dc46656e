"""The rows of `macrame up`, and how they are shown on a terminal, in lines and as JSON."""

from __future__ import annotations

import io
import json
from typing import Any

from deploy.node_handle import NodeProcess
from deploy.up_board import Event, NodeView, Phase
from deploy.up_display import JsonLines, Lines, LiveTable
from deploy.up_follow import Rates, Seen
from deploy.up_rows import headline, rows_of

RUNNING = NodeProcess(pid=7)


def told(**values: Any) -> dict[str, Any]:
    node = {
        "start": 0,
        "stop": 4,
        "load_total_bytes": 0,
        "loaded_bytes": 0,
        "memory": {
            "rss_bytes": 2_000_000_000,
            "available_bytes": 6_000_000_000,
            "total_bytes": 16_000_000_000,
        },
        "memory_pressure": "normal",
        "stats": {"recent_hop_ms": [0.3, 0.1, 0.2]},
        "edges": [{"kind": "wifi", "is_up": True}],
    }
    return node | values


def seen(*nodes: dict[str, Any], status: str = "ok", reason: str = "") -> Seen:
    cluster = {
        "model": "m",
        "status": status,
        "reason": reason,
        "num_active": 1,
        "max_active": 4,
        "num_queued": 2,
        "nodes": list(nodes),
    }
    return Seen(cluster, "http://127.0.0.1:8080", {0: 20.04}, 19.96)


def view(rank: int = 0, phase: Phase = Phase.RUNNING, **values: Any) -> NodeView:
    return NodeView(rank, f"n{rank}", "this machine", phase, process=RUNNING, **values)


def test_a_node_that_serves() -> None:
    (row,) = rows_of([view()], seen({"rank": 0, "state": "ready", "reason": "", "node": told()}))
    assert (row.state, row.layers, row.tok_s) == ("ready", "0:4", "20.0")
    assert row.memory == "2.0 GB, 6.0 GB free"
    assert row.link == "0.20 ms wifi"
    assert row.told == "ready"


def test_a_node_that_loads_has_a_bar() -> None:
    node = {"rank": 0, "state": "loading", "reason": "", "node": told(loaded_bytes=66, load_total_bytes=100)}
    (row,) = rows_of([view()], seen(node, status="loading"))
    assert row.done == 0.66
    assert row.told == "loading 60 %"
    assert row.tok_s == ""


def test_pressure_and_failure_are_told() -> None:
    node = {"rank": 0, "state": "failed", "reason": "no model here", "node": told(memory_pressure="critical")}
    (row,) = rows_of([view()], seen(node))
    assert row.memory.endswith(", critical")
    assert row.told == "failed: no model here"
    assert row.style == "red"


def test_the_process_goes_before_what_the_head_last_heard() -> None:
    node = {"rank": 0, "state": "ready", "reason": "", "node": told()}
    (row,) = rows_of([view(phase=Phase.RESTARTING, note="was killed by signal 9")], seen(node))
    assert row.told == "restarting: was killed by signal 9"
    assert row.layers == ""


def test_without_a_head_only_the_process_is_known() -> None:
    assert [row.state for row in rows_of([view(is_new=True), view(1)], Seen())] == ["starting", "running"]
    assert headline(Seen()) == "starting: the head's API does not answer"


def test_the_headline_of_a_ring_that_serves() -> None:
    assert headline(seen()) == "m at http://127.0.0.1:8080/v1: 1 of 4 requests, 2 queued, 20.0 tokens/s"
    assert headline(seen(status="degraded", reason="n1 is gone")) == "degraded: n1 is gone"


def test_rates_are_over_a_short_while_and_survive_a_counter_that_begins_anew() -> None:
    rates = Rates()
    assert rates.add(0.0, {0: 100}) == {0: 0.0}
    assert rates.add(1.0, {0: 110, 1: 5}) == {0: 10.0, 1: 0.0}
    assert rates.add(10.0, {0: 110})[0] == 0.0
    assert rates.add(11.0, {0: 3}) == {0: 0.0}


def test_lines_tell_each_change_once() -> None:
    out = io.StringIO()
    lines = Lines(out)
    ready = seen({"rank": 0, "state": "ready", "reason": "", "node": told()})
    for _ in range(2):
        lines.draw(rows_of([view()], ready), ready)
    lines.tell(Event("ready", "Ready."))
    lines.close()
    assert out.getvalue() == "n0: ready\nring: ok\nReady.\n"


def test_json_lines() -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    ready = seen({"rank": 0, "state": "ready", "reason": "", "node": told()})
    for _ in range(2):
        lines.draw(rows_of([view()], ready), ready)
    lines.tell(Event("died", "n0 died", 0, {"exit_code": -9}))
    lines.close()
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {
            "event": "state",
            "rank": 0,
            "name": "n0",
            "where": "this machine",
            "state": "ready",
            "reason": "",
            "loaded": None,
            "restarts": 0,
        },
        {"event": "ring", "status": "ok", "reason": ""},
        {"event": "died", "rank": 0, "text": "n0 died", "exit_code": -9},
    ]


def test_the_table_takes_names_as_they_are_and_ends_without_a_hint() -> None:
    out = io.StringIO()
    table = LiveTable(out)
    loading = {"rank": 0, "state": "loading", "reason": "", "node": told(loaded_bytes=1, load_total_bytes=2)}
    views = [NodeView(0, "[bold]n0", "me@[::1]", Phase.RUNNING, process=RUNNING, num_restarts=1)]
    table.draw(rows_of(views, seen(loading, status="loading")), seen(loading, status="loading"))
    table.tell(Event("note", "[red]as it is"))
    stopped = [NodeView(0, "[bold]n0", "me@[::1]", Phase.STOPPED)]
    table.draw(rows_of(stopped, seen(loading)), seen(loading))
    table.close()
    last = out.getvalue()
    assert "[bold]n0" in last
    assert "[red]as it is" in last
    assert "stopped" in last
    assert "Ctrl-C" not in last.rpartition("stopped")[2]
