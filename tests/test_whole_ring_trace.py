"""Traces of a ring of real processes: their properties, their company, their end, and a node that dies."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, load_config
from cluster.errors import UserError
from cluster.trace_client import LEASE_S, Choices, Tracing
from cluster.trace_recorder import Kind
from cluster.trace_run import Ask, Traced, trace_ring
from cluster.trace_spans import Part
from proto import control_pb2_grpc, trace_pb2
from tests.reference import greedy
from tests.ring_processes import NO_GUESSES, RingProcesses
from tests.trace_checks import check_rows, check_table, check_ways

pytestmark = pytest.mark.long
DEMO = Path(__file__).parent.parent / "deploy" / "demo" / "model"
LAYERS = [(0, 3), (3, 8), (8, 9)]
PROMPT = list(range(40, 72))


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    folder = tmp_path_factory.mktemp("traced")
    with RingProcesses(folder, DEMO, LAYERS, speculation=NO_GUESSES) as ring:
        ring.wait_ok()
        yield ring


@pytest.fixture
def config(ring: RingProcesses) -> ClusterConfig:
    return load_config(ring.config_path)


def ask(num_tokens: int, **options: bool) -> Ask:
    return Ask(itertools.repeat(PROMPT), num_tokens, **options)


def test_a_trace_fits_together(config: ClusterConfig) -> None:
    traced = trace_ring(config, None, ask(32), Choices())
    assert traced.trouble == []
    assert traced.num_tokens == 32
    assert len(traced.answer.trips) == 31
    assert check_rows(traced.file()) > 31 * 15
    assert check_ways(traced) >= 3 * 31
    check_table(traced)
    shares = {row["part"]: row["share"] for row in traced.summary()["parts"]}
    assert shares["other"] < 0.2
    assert shares["compute"] > 0.2
    for node in traced.nodes:  # on one machine all processes read one clock: the truth is 0
        assert node.clock is not None
        clock = traced.timeline.clocks[node.rank]
        at = node.records[len(node.records) // 2].began
        assert abs(clock.ours(at) - at) <= clock.uncertainty + 1e-6


@pytest.mark.parametrize("layers", [[(3, 8), (0, 3), (8, 9)], [None, (0, 5), (5, 9)], [(5, 9), (0, 5)]])
def test_a_head_in_any_place(tmp_path: Path, layers: list[tuple[int, int] | None]) -> None:
    with RingProcesses(tmp_path, DEMO, layers, speculation=NO_GUESSES) as ring:
        ring.wait_ok()
        traced = trace_ring(load_config(ring.config_path), None, ask(8), Choices())
    assert traced.trouble == []
    check_rows(traced.file())
    assert check_ways(traced) >= 8 * (len(layers) - (layers[-1] == (0, 5)))
    check_table(traced)


def test_every_row_of_every_node_is_there(config: ClusterConfig) -> None:
    traced = trace_ring(config, None, ask(8), Choices())
    have = {(span.rank, span.part) for span in traced.timeline.spans}
    for rank in range(3):
        assert {(rank, part) for part in (Part.QUEUE, Part.BUILD, Part.COMPUTE, Part.OUT, Part.IN)} <= have
    assert {(0, Part.HEAD), (0, Part.RETURN), (1, Part.WIRE), (2, Part.WIRE), (2, Part.SAMPLE)} <= have
    file = traced.file()
    assert file["otherData"]["nodes"][1]["clock_uncertainty_us"] > 0
    arrows = [event["ph"] for event in file["traceEvents"] if event["ph"] in "sf"]
    assert arrows.count("s") == arrows.count("f") > 20


def test_layers_one_by_one_are_all_there_and_change_no_token(
    ring: RingProcesses, config: ClusterConfig
) -> None:
    traced = trace_ring(config, None, ask(6, is_warmed=False), Choices(layers_per_span=1))
    trip = traced.answer.trips[-1]
    names = [span.name for span in sorted(trip.frame.spans, key=lambda s: s.began) if "layer" in span.name]
    assert names == [f"layer {i}" for i in range(9)]
    assert any(span.name == "norm, head" for span in trip.frame.spans)
    assert check_rows(traced.file())
    assert traced.summary()["layers_per_span"] == 1
    check_table(traced)
    ring.wait_status(lambda status: status.num_active == 0)
    grouped = trace_ring(config, None, ask(6, is_warmed=False), Choices(layers_per_span=2))
    names = [s.name for s in grouped.answer.trips[-1].frame.spans if s.name.startswith("layer")]
    assert sorted(names) == ["layer 2", "layer 7", "layer 8", "layers 0:2", "layers 3:5", "layers 5:7"]
    tracing = Tracing(config.nodes, None, "layers", Choices(layers_per_span=1))
    tracing.start()
    try:
        assert ring.tokens(PROMPT, 12) == greedy(DEMO, PROMPT, 12)[0]
    finally:
        tracing.stop()


def test_others_are_served_meanwhile_and_seen_waiting(ring: RingProcesses, config: ClusterConfig) -> None:
    told: list[list[int]] = []
    other = threading.Thread(target=lambda: told.append(ring.tokens(PROMPT[:9], 120)))
    other.start()
    try:
        ring.wait_status(lambda status: status.num_active == 1)
        traced = trace_ring(config, None, ask(24), Choices())
        assert traced.num_others == 1
        assert not traced.trouble
        with pytest.raises(UserError, match="--anyway"):
            trace_ring(config, None, ask(4), Choices(layers_per_span=1))
    finally:
        other.join()
    assert told == [greedy(DEMO, PROMPT[:9], 120)[0]]
    frames = traced.timeline.frames.values()
    assert any(traced.answer.session not in frame.sessions for frame in frames)
    check_rows(traced.file())
    check_ways(traced)
    check_table(traced)


def test_a_client_that_dies_leaves_nothing_on(ring: RingProcesses, config: ClusterConfig) -> None:
    with ring.channel(1) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        asked = trace_pb2.TraceRequest(id="dead", lease_s=0.5)
        assert stub.Trace(asked).reason == ""
        with pytest.raises(UserError, match="n1 cannot be traced: it is being traced already"):
            trace_ring(config, None, ask(4), Choices())
        assert list(stub.PullTrace(trace_pb2.PullTraceRequest(id="dead")))
        deadline = time.monotonic() + LEASE_S
        while stub.Trace(trace_pb2.TraceRequest(id="next", lease_s=0.1)).reason:
            assert time.monotonic() < deadline
    with ring.channel(0) as channel:  # those that were not refused were switched off again
        assert control_pb2_grpc.ControlStub(channel).Trace(asked).reason == ""


def test_a_frozen_node_is_a_sentence_in_bounded_time(tmp_path: Path) -> None:
    with RingProcesses(tmp_path, DEMO, [(0, 5), (5, 9)], speculation=NO_GUESSES) as ring:
        ring.wait_ok()
        config = load_config(ring.config_path)
        found: list[Traced] = []
        tracer = threading.Thread(
            target=lambda: found.append(trace_ring(config, None, ask(400, is_warmed=False), Choices()))
        )
        tracer.start()
        ring.wait_status(lambda status: status.num_completion_tokens > 8)
        ring.pause(1)
        tracer.join(30)
        is_over = not tracer.is_alive()
        ring.resume(1)
    assert is_over
    (traced,) = found
    assert any("n1:" in trouble and "is it frozen?" in trouble for trouble in traced.trouble)
    assert traced.answer.trips
    check_rows(traced.file())


def test_a_node_that_dies_leaves_a_partial_trace(ring: RingProcesses, config: ClusterConfig) -> None:
    ring.wait_ok()
    threading.Event().wait(0.6)  # the leases of the test before
    found: list[Traced] = []
    tracer = threading.Thread(
        target=lambda: found.append(trace_ring(config, None, ask(400, is_warmed=False), Choices()))
    )
    num_before = ring.wait_ok().num_completion_tokens
    tracer.start()
    ring.wait_status(lambda status: status.num_completion_tokens > num_before + 8)
    ring.kill(1)
    tracer.join(60)
    (traced,) = found
    broken, away = traced.trouble
    assert "broke off after" in broken
    assert "send the request again" in broken
    assert away.startswith("n1: there is no connection to")
    assert 8 < traced.num_tokens < 400
    assert traced.nodes[0].records
    assert not traced.nodes[1].records
    file = traced.file()
    assert check_rows(file)
    assert file["otherData"]["trouble"] == traced.trouble
    assert any(event["name"] == "unfinished" for event in file["traceEvents"])
    kinds = {record.kind for record in traced.nodes[2].records}
    assert Kind.COMPUTED in kinds
