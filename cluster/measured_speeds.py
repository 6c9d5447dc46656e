"""A machine's measured speeds with their date: on the wire and as JSON. Pure.

Both come from outside, so both are checked: by the types here, and by `Speeds` itself.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from planner.node_profile import NodeProfile
from planner.speeds import FormatRate, Speeds
from proto import control_pb2

MAX_FORMATS = 64
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_FORMAT = re.compile(r"[a-z0-9/+]{1,32}")
_RATE_KEYS = ("weights_ms", "flops_ms", "decoded_ms")  # the last one is not in files of earlier releases
_RATES = ("read_bytes_ms", "flops_ms", "layer_ms", "stage_ms")


@dataclass(frozen=True, slots=True)
class MeasuredSpeeds:
    """What `macrame profile` found. Raises ValueError for a date that is none, or formats that cannot be."""

    speeds: Speeds
    measured_on: str  # as 2026-11-21

    def __post_init__(self) -> None:
        if not _DATE.fullmatch(self.measured_on):
            raise ValueError(f"measured_on = {self.measured_on[:40]!r} must be a date such as 2026-11-21")
        if len(self.speeds.formats) > MAX_FORMATS:
            raise ValueError(f"formats = {len(self.speeds.formats)} must be at most {MAX_FORMATS}")
        for rate in self.speeds.formats:
            if not _FORMAT.fullmatch(rate.format):
                raise ValueError(f"format = {rate.format[:40]!r} must be a name such as affine4/64")

    def to_proto(self) -> control_pb2.Speeds:
        """For a node's profile."""
        found = self.speeds
        rates = [control_pb2.FormatRate(**asdict(rate)) for rate in found.formats]
        values = {key: getattr(found, key) for key in _RATES}
        return control_pb2.Speeds(**values, formats=rates, measured_on=self.measured_on)

    @classmethod
    def from_proto(cls, told: control_pb2.Speeds) -> MeasuredSpeeds:
        """Raises ValueError naming what is wrong."""
        rates = tuple(FormatRate(r.format, r.weights_ms, r.flops_ms, r.decoded_ms) for r in told.formats)
        values = {key: getattr(told, key) for key in _RATES}
        return cls(Speeds(**values, formats=rates, source="measured"), told.measured_on)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        values = asdict(self.speeds)
        del values["source"], values["forms"]  # the one is always the same, the others are not of the profile
        return values | {"formats": list(values["formats"]), "measured_on": self.measured_on}

    @classmethod
    def from_dict(cls, data: Any) -> MeasuredSpeeds:
        """Raises ValueError naming what is wrong."""
        try:
            rates = tuple(
                FormatRate(str(r["format"]), *(_number({"decoded_ms": 0.0} | r, key) for key in _RATE_KEYS))
                for r in data["formats"]
            )
            read_ms, flops_ms, layer_ms, stage_ms = (_number(data, key) for key in _RATES)
            speeds = Speeds(read_ms, flops_ms, layer_ms, stage_ms, rates, "measured")
            return cls(speeds, str(data["measured_on"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no speeds: {error!r}") from None


def told_speeds(node: NodeProfile) -> control_pb2.Speeds | None:
    """What a node tells the head of its speeds; None: they were never measured."""
    if node.measured is None:
        return None
    return MeasuredSpeeds(node.measured, node.measured_on).to_proto()


def _number(data: Any, key: str) -> float:
    value = data[key]
    if type(value) not in (int, float):
        raise ValueError(f"{key} = {value!r} must be a number")
    return float(value)
