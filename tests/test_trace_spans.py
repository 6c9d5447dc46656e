"""Spans, trips and the file, of records whose times are known."""

from __future__ import annotations

import json

import pytest

from cluster.trace_client import NodeTrace
from cluster.trace_clock import Clock, Moment
from cluster.trace_file import trace_file
from cluster.trace_parts import SHOWN, Answer, answer_of, stage_means_ms, table
from cluster.trace_recorder import NO_PEER, Kind, Record
from cluster.trace_spans import Part, Timeline, timeline
from proto import ring_pb2
from tests.trace_checks import check_rows

AHEAD = {0: 1000.0, 1: -50.0}  # of the nodes' clocks
MS = 1e-3
STEP, RESULT = ring_pb2.STEP, ring_pb2.RESULT
# One token, in ms after it was fed: head and first stage on rank 0, the last stage on rank 1.
PARTS_MS = {
    Part.QUEUE: 1.0 + 0.5,
    Part.BUILD: 2.0 + 1.0,
    Part.COMPUTE: 4.0 + 3.0,
    Part.SAMPLE: 0.5 + 0.25,
    Part.OUT: 0.25 + 0.5 + 0.25,
    Part.CREDIT: 0.25,
    Part.WIRE: 2.0,
    Part.IN: 0.5 + 0.25,
    Part.RETURN: 1.0,
    Part.HEAD: 0.5,
    Part.OTHER: 0.25,
}
TRIP_MS = sum(PARTS_MS.values())


def records(num_tokens: int, *, lost: bool = False) -> list[NodeTrace]:
    """As two nodes would make them; with `lost` the last frame never comes back."""
    own: dict[int, list[Record]] = {0: [], 1: []}
    now = 0.0

    def add(rank: int, kind: Kind, seq: int, took_ms: float, *numbers: int, back_ms: float = 0.0) -> None:
        nonlocal now
        began = now - back_ms * MS
        now = max(now, began + took_ms * MS)
        peer = 1 - rank if kind in (Kind.ENCODED, Kind.SENT, Kind.ARRIVED) else NO_PEER
        at = began + AHEAD[rank]
        own[rank].append(Record(kind, seq, at, at + took_ms * MS, peer, numbers, ""))

    own[0].append(Record(Kind.OPENED, 1, AHEAD[0], AHEAD[0], NO_PEER, (5,), "mine"))
    for seq in range(1, num_tokens + 1):
        add(0, Kind.FED, seq, 0, 1, 1, 5)
        fed_ms = now / MS
        now += 1.0 * MS
        add(0, Kind.BUILT, seq, 2.0, 1, 1)
        add(0, Kind.COMPUTED, seq, 4.0)
        add(0, Kind.COPIED_OUT, seq, 0.25)
        now += 0.25 * MS  # nobody's
        add(0, Kind.ENCODED, seq, 0.5, 100, STEP)
        add(0, Kind.SENT, seq, 0.25, 100, STEP)
        now += 2.0 * MS
        add(1, Kind.ARRIVED, seq, 0.5, 100, STEP)
        now += 0.5 * MS
        if lost and seq == num_tokens:
            break
        add(1, Kind.BUILT, seq, 1.5, 1, 1)
        add(1, Kind.SAMPLED, seq, 0.5, back_ms=0.5)  # within the building
        add(1, Kind.COMPUTED, seq, 3.0)
        add(1, Kind.SAMPLED, seq, 0.25)
        add(1, Kind.ENCODED, seq, 0.25, 20, RESULT)
        add(1, Kind.SENT, seq, 0.0, 20, RESULT)
        now += 1.0 * MS
        add(0, Kind.ARRIVED, seq, 0.25, 20, RESULT)
        add(0, Kind.RETURNED, seq, 0.5, 5, 1)
        assert now / MS - fed_ms == pytest.approx(TRIP_MS)
    clocks = {
        rank: Clock(Moment(ahead, ahead, 1e-5), Moment(1.0 + ahead, ahead, 1e-5))
        for rank, ahead in AHEAD.items()
    }
    return [NodeTrace(rank, f"n{rank}", own[rank], 0, clocks[rank]) for rank in own]


def answered(nodes: list[NodeTrace]) -> tuple[Timeline, Answer]:
    line = timeline(nodes)
    return line, answer_of(line, "mine")


def test_parts_are_what_they_took_and_add_up() -> None:
    line, answer = answered(records(4))
    assert (answer.session, len(answer.trips), answer.unfinished) == (5, 3, ())
    for trip in answer.trips:
        assert trip.took == pytest.approx(TRIP_MS * MS)
        assert {part: ms * MS for part, ms in PARTS_MS.items()} == pytest.approx(dict(trip.parts))
    rows = table(answer.trips)
    assert [row.part for row in rows] == list(SHOWN)
    assert sum(row.mean_ms for row in rows) == pytest.approx(TRIP_MS)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert stage_means_ms(answer.trips, 1)["compute"] == pytest.approx(3.0)
    assert stage_means_ms(answer.trips, 0)["return to the head"] == pytest.approx(1.0)
    assert all(clock.uncertainty <= 1.0001e-5 for clock in line.clocks.values())


def test_a_device_that_is_busy_is_waited_for() -> None:
    node = records(1)[0]
    begin = AHEAD[0] + 1.0

    def at(kind: Kind, seq: int, began: float, ended: float) -> Record:
        return Record(kind, seq, begin + began, begin + ended, NO_PEER, (1, 1), "")

    node.records = [
        at(Kind.BUILT, 1, 0, 1),
        at(Kind.BUILT, 2, 1, 2),  # while the device computes the first
        at(Kind.COMPUTED, 1, 2, 5),
        at(Kind.COMPUTED, 2, 5, 9),
    ]
    spans = [(s.part, s.seq, round(s.began, 6), round(s.ended, 6)) for s in timeline([node]).spans]
    assert (Part.COMPUTE, 1, 2.0, 6.0) in spans
    assert (Part.QUEUE, 2, 3.0, 6.0) in spans
    assert (Part.COMPUTE, 2, 6.0, 10.0) in spans


def test_the_file_has_a_row_for_each_part_and_nests() -> None:
    line, answer = answered(records(4))
    file = json.loads(json.dumps(trace_file(line, answer, {0: "n0 0:3", 1: "n1 3:5"}, {"trouble": []})))
    assert check_rows(file) == len(line.spans) + 4 * (1 + 2 + 2 + 1)
    rows = [e["args"]["name"] for e in file["traceEvents"] if e["name"] == "thread_name" and e["pid"] == 2]
    assert rows == ["wire", "copy in", "queue", "graph building", "compute", "sampling", "copy out"]
    tokens = [e["name"] for e in file["traceEvents"] if e["pid"] == 0 and e["ph"] == "X" and e["args"]]
    assert {"first token", "token 2", "token 4"} <= set(tokens)


def test_the_wait_before_the_first_frame_is_drawn() -> None:
    line, answer = answered(records(3))
    file = trace_file(line, answer, {0: "n0", 1: "n1"}, {"queued_ms": 5.0})
    check_rows(file)
    waits = [e for e in file["traceEvents"] if e["name"] == "waits to be started"]
    assert [(e["ts"], e["dur"]) for e in waits] == [(0.0, pytest.approx(5000.0))]


def test_frames_that_wait_at_once_have_rows_of_their_own() -> None:
    nodes = records(2)
    late = AHEAD[1] + 5.0
    for seq in (8, 9):
        nodes[1].records.append(Record(Kind.ARRIVED, seq, late, late + 0.001, 0, (9, STEP), ""))
    for seq in (8, 9):
        began = late + 0.01 * seq
        nodes[1].records.append(Record(Kind.BUILT, seq, began, began + 0.001, NO_PEER, (1, 1), ""))
    line, answer = answered(nodes)
    file = trace_file(line, answer, {0: "n0", 1: "n1"}, {})
    check_rows(file)
    rows = [e["args"]["name"] for e in file["traceEvents"] if e["name"] == "thread_name"]
    assert "queue 2" in rows


def test_a_frame_that_never_came_back_is_said_to_be_unfinished() -> None:
    line, answer = answered(records(4, lost=True))
    assert (len(answer.trips), [frame.seq for frame in answer.unfinished]) == (2, [4])
    file = trace_file(line, answer, {0: "n0", 1: "n1"}, {})
    check_rows(file)
    assert sum(e["name"] == "unfinished" for e in file["traceEvents"]) == 1


def test_a_node_without_a_clock_is_left_out() -> None:
    nodes = records(3)
    nodes[1].clock = None
    line, answer = answered(nodes)
    assert {span.rank for span in line.spans} == {0}
    assert answer.trips[0].parts[Part.OTHER] > 0
    assert timeline([]).spans == []
    assert table(()) == []


def test_a_request_that_never_entered_has_no_trips() -> None:
    line = timeline(records(3))
    assert answer_of(line, "another") == Answer(None, 0.0, None, (), ())
