"""The head's status as Prometheus metrics: values, what a dead node loses, and that labels are bounded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.metrics import Gaps, Metrics
from cluster.api.metrics_ring import is_heard, ring_metrics
from proto import control_pb2, head_pb2

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(families: Iterable[Metric]) -> Series:
    """Every sample by its name and labels."""
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def node(**values: object) -> control_pb2.NodeStatus:
    status = control_pb2.NodeStatus(kv_bytes=5, start=2, stop=5, memory_pressure="warning", **values)
    status.stats.busy_ms = 1500.0
    status.stats.recent_step_ms.extend([1.0, 3.0, 2.0])
    status.stats.recent_hop_ms.extend([4.0, 8.0, 6.0])
    status.stats.recent_hop_rank.extend([1, 2, 1])
    status.edges.add(to_rank=1, is_up=True)
    status.edges.add(to_rank=2, is_up=False)
    return status


def ring(*, age_s: float = 0.1, state: str = "ready") -> head_pb2.ClusterStatus:
    status = head_pb2.ClusterStatus(status="ok", num_active=3, num_queued=2, max_active=4)
    status.errors.add(kind="busy", count=7)
    status.ranks.add(rank=0, name="mini", state=state, age_s=age_s, node=node())
    return status


def test_values_have_base_units() -> None:
    found = series(ring_metrics("ok", ring()))
    mini = (("node", "mini"), ("rank", "0"))
    assert found["macrame_sessions_queued", ()] == 2
    assert found["macrame_request_errors_total", (("kind", "busy"),)] == 7
    assert found["macrame_stage_busy_seconds_total", mini] == 1.5
    assert found["macrame_node_layers", mini] == 3
    assert found["macrame_stage_step_seconds", (mini[0], ("quantile", "0.5"), mini[1])] == 0.002
    hop = (mini[0], ("quantile", "0.99"), mini[1], ("to_rank", "2"))
    assert found["macrame_hop_seconds", hop] == 0.008
    assert found["macrame_edge_up", (*mini, ("to_rank", "2"))] == 0
    assert found["macrame_node_memory_pressure", (("level", "warning"), *mini)] == 1
    assert not any(name.endswith("expiry_timestamp_seconds") for name, _ in found)  # no TLS


@pytest.mark.parametrize(
    "status", [ring(age_s=60.0, state="unreachable"), head_pb2.ClusterStatus(ranks=[{}])]
)
def test_a_node_that_is_not_heard_has_no_old_numbers(status: head_pb2.ClusterStatus) -> None:
    assert not is_heard(status.ranks[0])
    found = series(ring_metrics("degraded", status))
    of_nodes = {name for name, labels in found if "rank" in dict(labels)}
    assert of_nodes == {"macrame_node_up", "macrame_node_state"}
    assert all(value == 0 for (name, _), value in found.items() if name == "macrame_node_up")


def test_without_a_head_only_that_is_said() -> None:
    found = series(ring_metrics("degraded", None))
    assert found["macrame_head_up", ()] == 0
    assert found["macrame_status", (("status", "degraded"),)] == 1
    assert {name for name, _ in found} == {"macrame_head_up", "macrame_status"}


def test_the_number_of_series_does_not_grow_with_what_happens() -> None:
    quiet, strange = ring(), ring(state="some new state")
    strange.ranks[0].node.memory_pressure = "unheard of"
    strange.ranks[0].node.reason = strange.reason = "any text"
    strange.ranks[0].node.stats.recent_step_ms.extend(range(500))
    strange.requests.add(id="r", state="decode")
    assert series(ring_metrics("odd", strange)).keys() == series(ring_metrics("ok", quiet)).keys()


def test_gaps_are_counted_in_their_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1.004, 1.204, 99.0))
    monkeypatch.setattr("cluster.api.metrics.time.monotonic", lambda: next(now))
    gaps, then = Gaps(), 1.0
    for _ in range(3):
        then = gaps.add(then)
    found = series(gaps.collect())
    assert found["macrame_inter_token_seconds_bucket", (("le", "0.005"),)] == 1
    assert found["macrame_inter_token_seconds_bucket", (("le", "0.25"),)] == 2
    assert found["macrame_inter_token_seconds_bucket", (("le", "5.0"),)] == 2
    assert found["macrame_inter_token_seconds_bucket", (("le", "+Inf"),)] == 3
    assert found["macrame_inter_token_seconds_count", ()] == 3
    assert found["macrame_inter_token_seconds_sum", ()] == pytest.approx(98.0)


def test_the_page_is_text_or_openmetrics() -> None:
    metrics = Metrics()
    metrics.watch(lambda: ("ok", ring()))
    text, kind = metrics.page("")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert b'macrame_status{status="ok"} 1.0\n' in text
    assert b"_created" not in text
    text, kind = metrics.page("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")


def test_the_document_lists_each_metric_with_its_type_and_words() -> None:
    metrics = Metrics()
    metrics.watch(lambda: ("ok", ring()))
    told = re.findall(r"^\| `(macrame_\w+)` \| (\w+) \| [^|]*\| (.*) \|$", PAGE.read_text(), flags=re.M)
    families = list(text_string_to_metric_families(metrics.page("")[0].decode()))
    assert told == [
        (family.name + "_total" * (family.type == "counter"), family.type, family.documentation)
        for family in families
        if family.name.startswith("macrame_")
    ]
