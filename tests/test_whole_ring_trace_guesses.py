"""Traces of rings that guess: frames of one answer overlap, and a draft model works beside them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.trace_client import Choices
from cluster.trace_parts import table
from cluster.trace_run import Ask, Traced, trace_ring
from cluster.trace_spans import Part
from tests.pruned_model import write_pruned
from tests.ring_processes import RingProcesses
from tests.trace_checks import check_rows, check_ways

pytestmark = pytest.mark.long
DEMO = Path(__file__).parent.parent / "deploy" / "demo" / "model"
PROMPT = [(37 * i) % 4000 + 40 for i in range(24)]


def traced(ring: RingProcesses, prompt: list[int], num_tokens: int) -> Traced:
    ring.wait_ok()
    ring.tokens(prompt, 8)  # it learns what a trip takes
    config = load_config(ring.config_path)
    found = trace_ring(config, None, Ask(itertools.repeat(prompt), num_tokens), Choices())
    assert found.trouble == []
    assert found.num_tokens == num_tokens
    check_rows(found.file())
    check_ways(found)
    trips = found.answer.trips
    for trip in trips:
        assert abs(sum(trip.parts.values()) - trip.took) < 1e-9
        assert trip.parts[Part.OTHER] > -1e-6
    assert sum(row.share for row in table(trips)) == pytest.approx(1)
    assert sum(trip.num_tokens for trip in trips) == num_tokens - 1
    assert found.summary()["tokens_of_trips"] == num_tokens - 1
    return found


def test_guesses_of_the_text_itself(tmp_path: Path) -> None:
    layers = [(0, 3), (3, 6), (6, 9)]
    with RingProcesses(tmp_path, DEMO, layers, faults=dict.fromkeys(range(3), "layer_delay_ms=5")) as ring:
        found = traced(ring, PROMPT * 3, 40)
    assert found.summary()["trips"] <= 39


def test_tokens_behind_a_wrong_guess_are_not_counted(tmp_path: Path) -> None:
    """One stage feeds guesses before it knows: a frame that turns out void has drawn tokens, too."""
    has_void = False
    with RingProcesses(tmp_path, DEMO, [(0, 9)]) as ring:
        for start in range(10):  # whether it guesses ahead, and wrongly, hangs on the machine's pace
            found = traced(ring, PROMPT[start:] * 3, 200)
            names = [event["name"] for event in found.file()["traceEvents"]]
            assert names.count("first token") == 1
            if has_void := "behind a wrong guess" in names:
                break
    assert has_void


def test_a_draft_model_has_a_row_of_its_own(tmp_path: Path) -> None:
    draft = write_pruned(DEMO, tmp_path / "draft", [0, 1, 2, 3, 4, 5, 7, 8])
    speculation = {"method": "draft", "draft_model": str(draft)}
    waits = dict.fromkeys(range(2), "layer_delay_ms=40")
    with RingProcesses(
        tmp_path, DEMO, [(0, 5), (5, 9)], concurrency=2, faults=waits, speculation=speculation
    ) as ring:
        found = traced(ring, PROMPT, 24)
    drafted = [span for span in found.timeline.spans if span.part is Part.DRAFT]
    assert len(drafted) > 8
    assert {span.rank for span in drafted} == {0}
    assert found.summary()["trips"] < 23  # some guesses were right
