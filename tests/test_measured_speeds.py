"""Measured speeds on the wire and as JSON: what is wrong is named, and never used."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from cluster.measured_speeds import MeasuredSpeeds, told_speeds
from planner.node_profile import make_node
from planner.speeds import FormatRate, Speeds
from proto import control_pb2

RATES = (
    FormatRate("affine4/64", 100.0, 300.0),
    FormatRate("bfloat16", 900.0, 2500.0),
    FormatRate("exl3/3", 400.0, 3000.0, 60.0),
)
FOUND = MeasuredSpeeds(Speeds(3e6, 5e6, 0.4, 0.05, RATES, "measured"), "2026-11-21")


def test_both_forms_come_back_as_they_were() -> None:
    told = control_pb2.Speeds.FromString(FOUND.to_proto().SerializeToString())
    assert MeasuredSpeeds.from_proto(told) == FOUND
    assert MeasuredSpeeds.from_dict(json.loads(json.dumps(FOUND.as_dict()))) == FOUND


def test_speeds_of_an_earlier_release_have_no_rate_of_decoding() -> None:
    data = FOUND.as_dict()
    for rate in data["formats"]:
        del rate["decoded_ms"]
    found = MeasuredSpeeds.from_dict(data).speeds.of("exl3/3")
    assert found == FormatRate("exl3/3", 400.0, 3000.0)


def test_a_node_tells_its_speeds_where_it_has_some() -> None:
    node = make_node(0, "n", "h", memory_bytes=10**9)
    assert told_speeds(node) is None
    assert not control_pb2.NodeProfile(speeds=told_speeds(node)).HasField("speeds")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("read_bytes_ms", 0, "read_bytes_ms = 0.0 must be a number above 0"),
        ("read_bytes_ms", math.nan, "read_bytes_ms = nan must be a number above 0"),
        ("flops_ms", math.inf, "flops_ms = inf must be a number above 0"),
        ("layer_ms", -1, "layer_ms = -1.0 must be a number of 0 or more"),
        ("stage_ms", math.nan, "stage_ms = nan must be a number of 0 or more"),
        ("measured_on", "yesterday", "measured_on = 'yesterday' must be a date such as 2026-11-21"),
        ("measured_on", "", "measured_on = '' must be a date"),
    ],
)
def test_wrong_values_from_outside_are_refused(key: str, value: Any, message: str) -> None:
    told = FOUND.to_proto()
    setattr(told, key, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        MeasuredSpeeds.from_proto(told)
    with pytest.raises(ValueError, match=re.escape(message)):
        MeasuredSpeeds.from_dict(FOUND.as_dict() | {key: value})


def test_wrong_formats_from_outside_are_refused() -> None:
    told = FOUND.to_proto()
    told.formats.add(format="affine4/64", weights_ms=1, flops_ms=1)
    with pytest.raises(ValueError, match="names one twice"):
        MeasuredSpeeds.from_proto(told)
    told = FOUND.to_proto()
    told.formats.add(format="x\ny", weights_ms=1, flops_ms=1)
    with pytest.raises(ValueError, match=r"format = 'x\\ny' must be a name such as affine4/64"):
        MeasuredSpeeds.from_proto(told)
    told = FOUND.to_proto()
    for number in range(70):
        told.formats.add(format=f"f{number}", weights_ms=1, flops_ms=1)
    with pytest.raises(ValueError, match="formats = 73 must be at most 64"):
        MeasuredSpeeds.from_proto(told)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "these are no speeds"),
        ({}, "these are no speeds: KeyError"),
        (FOUND.as_dict() | {"formats": 7}, "these are no speeds: TypeError"),
        (FOUND.as_dict() | {"flops_ms": "fast"}, "flops_ms = 'fast' must be a number"),
        (FOUND.as_dict() | {"flops_ms": True}, "flops_ms = True must be a number"),
    ],
)
def test_json_of_another_shape_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasuredSpeeds.from_dict(data)
