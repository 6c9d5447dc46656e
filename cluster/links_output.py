"""What `macrame links` prints of a measurement: text, JSON values, entries of a cluster file. Pure."""

from __future__ import annotations

from typing import Any

from cluster.interfaces import KIND_WORDS, KINDS
from cluster.links import Direction, Measurement, Pair
from planner.render import table
from proto import control_pb2

DIGITS = 3  # of a measured figure
UNEVEN = 2.0  # a direction so much slower than the other is told


def config_links(measurement: Measurement) -> list[dict[str, Any]]:
    """The `links` of a cluster file: one entry for each pair that was measured in both directions."""
    return [
        {
            "between": list(pair.names),
            "latency_ms": _rounded(pair.latency_ms),
            "bandwidth_gbit_s": _rounded(pair.bandwidth_gbit_s),
        }
        for pair in measurement.pairs
        if not pair.reasons
    ]


def pair_objects(measurement: Measurement) -> list[dict[str, Any]]:
    """All that was measured, for --json."""
    return [
        {
            "between": list(pair.names),
            "reasons": list(pair.reasons),
            "directions": [_direction_object(direction) for direction in (pair.there, pair.back)],
        }
        for pair in measurement.pairs
    ]


def render_links(measurement: Measurement) -> list[str]:
    """A table of what was measured, then a line for each pair that could not be, and for what is odd."""
    rows = [_row(pair) for pair in measurement.pairs if not pair.reasons]
    lines = table(rows) if rows else []
    for pair in measurement.pairs:
        lines += [f"{' - '.join(pair.names)} could not be measured: {reason}" for reason in pair.reasons]
    for pair in measurement.pairs:
        lines += _remarks(pair, measurement)
    return lines


def _row(pair: Pair) -> dict[str, str]:
    there, back = pair.there.best, pair.back.best
    assert there is not None
    assert back is not None
    return {
        "link": " - ".join(pair.names),
        "by": _by(there),
        "address": there.ip,
        "round trip": f"{there.round_trip_p50_ms:.2f} ms",
        "p99": f"{there.round_trip_p99_ms:.2f} ms",
        "there": f"{there.bandwidth_gbit_s:.3g} Gbit/s",
        "back": f"{back.bandwidth_gbit_s:.3g} Gbit/s",
        "MTU": str(there.mtu or "?"),
    }


def _by(path: control_pb2.LinkPath) -> str:
    ends = "/".join(dict.fromkeys(filter(None, (path.interface, path.peer_interface))))
    return f"{KIND_WORDS.get(path.kind, path.kind)} {ends}".rstrip()


def _remarks(pair: Pair, measurement: Measurement) -> list[str]:
    lines = []
    for direction in (pair.there, pair.back):
        best = direction.best
        if best is not None and len(direction.paths) > 1:
            lines += [
                f"{_from_to(direction)} also by {path.ip} ({_by(path)}): {_result(path)}"
                for path in direction.paths[1:]
            ]
            lines.append(f"{_from_to(direction)} prefers {best.ip} ({_by(best)}) when the ring connects anew")
        lines += _unused(direction, measurement)
    slow, fast = sorted((pair.there, pair.back), key=_bandwidth)
    is_local = any(d.best is not None and d.best.kind == "loopback" for d in (slow, fast))
    if not pair.reasons and not is_local and _bandwidth(fast) > UNEVEN * _bandwidth(slow):
        lines.append(
            f"{_from_to(slow)} has {_bandwidth(slow):.3g} Gbit/s, the other way {_bandwidth(fast):.3g}: "
            "the plan reckons with the slower one"
        )
    return lines


def _unused(direction: Direction, measurement: Measurement) -> list[str]:
    """Better interfaces of the receiving node on which it does not listen."""
    best, told = direction.best, measurement.profiles.get(direction.to_node.rank)
    if best is None or told is None or best.kind == "loopback":
        return []
    name = direction.to_node.name
    return [
        f"{name} also has {address.ip} ({KIND_WORDS[address.kind]} {address.interface}), where it does not "
        f"listen; to use it, name it as {name}'s host in the config"
        for address in told.addresses
        if not address.is_bound
        and address.kind in ("thunderbolt", "ethernet")
        and KINDS.index(address.kind) < KINDS.index(best.kind)
    ]


def _bandwidth(direction: Direction) -> float:
    return 0.0 if direction.best is None else direction.best.bandwidth_gbit_s


def _from_to(direction: Direction) -> str:
    return f"{direction.from_node.name} to {direction.to_node.name}"


def _result(path: control_pb2.LinkPath) -> str:
    if path.reason:
        return path.reason
    return f"round trip {path.round_trip_p50_ms:.2f} ms, {path.bandwidth_gbit_s:.3g} Gbit/s"


def _direction_object(direction: Direction) -> dict[str, Any]:
    return {
        "from": direction.from_node.name,
        "to": direction.to_node.name,
        "reason": direction.reason,
        "paths": [
            {field.name: getattr(path, field.name) for field in path.DESCRIPTOR.fields}
            for path in direction.paths
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
