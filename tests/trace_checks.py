"""What holds for every trace file, whoever made it: spans of a row nest or follow each other, ways fit."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from cluster.trace_run import Traced
from cluster.trace_spans import Part

ROUNDING_US = 0.01


def check_rows(file: dict[str, Any]) -> int:
    """No two spans of one row cross; returns how many there are."""
    rows = defaultdict(list)
    for event in file["traceEvents"]:
        assert event.get("ts", 0) >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            rows[event["pid"], event["tid"]].append(event)
    for events in rows.values():
        stack: list[float] = []
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            ended = event["ts"] + event["dur"]
            while stack and stack[-1] <= event["ts"] + ROUNDING_US:
                stack.pop()
            assert not stack or ended <= stack[-1] + ROUNDING_US, event
            stack.append(ended)
    return sum(map(len, rows.values()))


def check_ways(traced: Traced) -> int:
    """A frame's way lies between the sender's copy out and the receiver's copy in; returns how many do."""
    line = traced.timeline
    out = {(s.rank, s.seq, s.args["to"]): s for s in line.spans if s.name == "to messages"}
    came = {(s.rank, s.seq, s.args["from"]): s for s in line.spans if s.part is Part.IN}
    for hop in line.hops:
        doubt = line.clocks[hop.from_rank].uncertainty + line.clocks[hop.to_rank].uncertainty
        copied = out.get((hop.from_rank, hop.seq, hop.to_rank))
        decoded = came[hop.to_rank, hop.seq, hop.from_rank]
        if copied is not None:
            assert copied.ended <= hop.sent + 1e-9
            assert copied.ended <= decoded.began + doubt
        assert hop.arrived <= decoded.began + 1e-9
        assert hop.sent <= hop.arrived + doubt
    return len(line.hops)


def check_table(traced: Traced) -> None:
    """Parts add up to each trip, and trips follow each other where nothing was guessed."""
    trips = traced.answer.trips
    for trip in trips:
        assert abs(sum(trip.parts.values()) - trip.took) < 1e-9
        # What no span covers is little, and none is counted twice.
        assert trip.parts[Part.OTHER] > -1e-6, trip.parts
    for one, following in itertools.pairwise(trips):
        assert one.ended == following.frame.fed
    rows = traced.summary()["parts"]
    assert abs(sum(row["share"] for row in rows) - 1) < 1e-9
    assert abs(sum(row["mean_ms"] for row in rows) - traced.summary()["trip_ms"]["mean"]) < 1e-6
