"""All that a plan was made from, as one value that crosses the wire as JSON. Pure.

Any frozen dataclass of numbers, texts, tuples and other such dataclasses can be written and read back; what
is read is checked against the types of its fields.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from planner.cost import Link
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.solver import PlanOptions


@dataclass(frozen=True, slots=True)
class PlannedFrom:
    """What `make_plan` was given."""

    model: ModelProfile
    nodes: tuple[NodeProfile, ...]
    links: tuple[Link, ...]
    options: PlanOptions

    def to_json(self) -> str:
        """Compact JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), default=_as_list)

    @classmethod
    def from_plain(cls, data: object) -> PlannedFrom:
        """The value that `to_json` wrote, already parsed. Raises ValueError naming what is wrong where."""
        value = _read(cls, data, "planning")
        assert isinstance(value, PlannedFrom)
        return value


def _as_list(value: object) -> list[Any]:
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, data: object, where: str) -> Any:
    """`data` as a value of the type `kind`. Raises ValueError."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(inner, data, where)
    if origin is Literal:
        if data in inner:
            return data
        raise ValueError(f"{where} = {data!r} must be one of {', '.join(map(str, inner))}")
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    if origin in (tuple, frozenset):
        return _sequence(origin, inner, data, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        return {key: _read(inner[1], value, f"{where}.{key}") for key, value in data.items()}
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise ValueError(f"{where} = {data!r} must be of type {getattr(kind, '__name__', kind)}")
    return data


def _one_of(kinds: tuple[Any, ...], data: object, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    errors = []
    for kind in rest:
        try:
            return _read(kind, data, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _dataclass(kind: Any, data: object, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object")
    known = {field.name: field for field in fields(kind) if field.init}
    for key in data:
        if key not in known:
            raise ValueError(f"{where}.{key} is not known here: the ring runs another version of macrame")
    values = {}
    for key, field in known.items():
        if key in data:
            values[key] = _read(_hints(kind)[key], data[key], f"{where}.{key}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}.{key} is missing: the ring runs another version of macrame")
    return kind(**values)


def _sequence(origin: Any, inner: tuple[Any, ...], data: object, where: str) -> Any:
    if not isinstance(data, list):
        raise ValueError(f"{where} must be a list")
    is_fixed = origin is tuple and inner[-1] is not Ellipsis
    if is_fixed and len(data) != len(inner):
        raise ValueError(f"{where} must have {len(inner)} entries")
    kinds = inner if is_fixed else (inner[0],) * len(data)
    return origin(
        _read(kind, value, f"{where}[{at}]") for at, (kind, value) in enumerate(zip(kinds, data, strict=True))
    )
