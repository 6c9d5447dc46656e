"""A stage that builds a step while its device computes another: the device's row has one span at a time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cluster.trace_client import NodeTrace
from cluster.trace_clock import Clock, Moment
from cluster.trace_recorder import KEPT_S, Kind, recorder
from cluster.trace_spans import Part, timeline
from tests.test_overlap import run
from tests.tiny_models import write_checkpoint

DELAY_MS = 5.0


def test_a_device_computes_one_frame_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_FAULT", f"step_delay_ms={DELAY_MS}")  # stands for what the device does
    model = write_checkpoint("llama", tmp_path, num_layers=3)
    assert recorder.switch("overlap", 20) == ""
    try:
        run(model, overlaps=True)
        found = recorder.pull("overlap")
    finally:
        recorder.switch("overlap", 0)
        recorder.tick(KEPT_S)
    assert found is not None
    records = found[0]
    assert sum(record.kind is Kind.LOADED for record in records) == 1
    at = records[0].began
    node = NodeTrace(0, "n0", records, clock=Clock(Moment(at, 0.0, 0.0), Moment(at + 9, 0.0, 0.0)))
    spans = timeline([node]).spans
    device = sorted((s for s in spans if s.part is Part.COMPUTE), key=lambda s: s.began)
    assert [span.seq for span in device] == [seq for seq in range(1, 18) if seq != 7]  # that is nobody's
    for one, following in itertools.pairwise(device):
        assert one.ended <= following.began
    waited = {span.seq for span in spans if span.name == "waits for the device"}
    assert {5, 6, 11} <= waited  # built while the one before was computed
    built = {span.seq: span for span in spans if span.name == "build"}
    assert built[5].ended < device[3].ended
