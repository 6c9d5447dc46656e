"""The ring of records: off without a trace, bounded with one, and over when its lease is."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cluster.instructions import Emit
from cluster.trace_client import NodeTrace, from_message, troubles
from cluster.trace_head import note_returned
from cluster.trace_recorder import KEPT_S, MAX_LEASE_S, Kind, Record, Recorder, recorder, to_message
from proto import ring_pb2


@pytest.fixture
def records() -> Iterator[Recorder]:
    records = Recorder(capacity=8)
    yield records
    records.switch("t", 0)
    records.tick(KEPT_S)  # nothing ticks it any more


def add(records: Recorder, count: int) -> None:
    for seq in range(count):
        records.add(Kind.BUILT, seq, 1.0, 2.0, numbers=(1, seq))


def test_it_keeps_nothing_while_it_is_off(records: Recorder) -> None:
    assert not records.on
    add(records, 3)
    assert records.pull("t") is None
    assert records.switch("t", 0) == ""  # off is no news
    assert not records.on


def test_the_latest_are_kept_and_the_others_counted(records: Recorder) -> None:
    assert records.switch("t", 5) == ""
    add(records, 11)
    kept, num_dropped = records.pull("t") or ([], 0)
    assert [record.seq for record in kept] == list(range(3, 11))
    assert num_dropped == 3
    records.switch("t", 0)
    add(records, 1)
    assert records.pull("t") == (kept, 3)
    assert records.pull("u") is None
    records.switch("u", 5)
    assert records.pull("u") == ([], 0)
    records.switch("u", 0)


def test_a_lease_that_is_not_renewed_ends_it_and_frees_all(records: Recorder) -> None:
    records.switch("t", 1.0, 2, memory=True)
    add(records, 2)
    records.tick(0.9)
    assert records.on
    records.switch("t", 1.0, 2, memory=True)  # renewed: what was recorded stays
    records.tick(0.9)
    assert records.on
    assert records.pull("t") is not None
    records.tick(0.2)
    assert (records.on, records.layers_per_span, records.has_memory) == (False, 0, False)
    assert records.pull("t") is None
    records.switch("t", 1e9)
    records.tick(MAX_LEASE_S)
    assert not records.on


def test_what_was_recorded_waits_a_while_for_who_pulls(records: Recorder) -> None:
    records.switch("t", 1.0, 1)
    records.switch("t", 0)
    assert (records.on, records.layers_per_span) == (False, 0)
    records.tick(KEPT_S - 1)
    assert records.pull("t") is not None
    records.tick(1.1)
    assert records.pull("t") is None


def test_a_second_trace_is_refused_with_a_sentence(records: Recorder) -> None:
    records.switch("t", 7)
    assert records.switch("u", 7) == "it is being traced already, for 7 s more at least; try again then"
    assert "already" in records.switch("u", 0)  # nor does a stranger end it
    assert records.on


def test_the_process_ticks_it() -> None:
    records = Recorder()
    records.switch("t", 0.05)
    over = threading.Event()
    for _ in range(100):
        if not records.on:
            break
        over.wait(0.05)
    assert not records.on
    assert records.pull("t") is None


def test_what_is_missing_of_a_trace_is_said() -> None:
    nodes = [
        NodeTrace(0, "a"),
        NodeTrace(1, "b", trouble="it is gone"),
        NodeTrace(2, "c", num_dropped=7),
    ]
    assert troubles(nodes) == [
        "b: it is gone",
        "c recorded more than it keeps: the earliest 7 records are lost",
    ]


def test_a_record_crosses_the_wire() -> None:
    record = Record(Kind.OPENED, 7, 12.5, 12.75, -1, (3,), "who")
    assert from_message(to_message(record)) == record


def test_a_result_counts_the_tokens_that_an_answer_has() -> None:
    """Session 8's token stood behind a wrong guess, so nothing followed from it."""
    result = ring_pb2.SampledToken(id=3)
    slots = [ring_pb2.Slot(session=number, result=result, more=[result]) for number in (7, 8)]
    kept = [Emit("r", result, "", 1, count, session=7) for count in (1, 2)]
    recorder.switch("t", 5)
    try:
        note_returned(ring_pb2.Frame(seq=4, slots=slots), 1.0, kept)
        ((record,), _) = recorder.pull("t") or ([], 0)
    finally:
        recorder.switch("t", 0)
        recorder.tick(KEPT_S)
    assert (record.kind, record.seq, list(record.numbers)) == (Kind.RETURNED, 4, [7, 2, 8, 0])
