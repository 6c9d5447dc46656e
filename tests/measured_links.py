"""Measurements of links written by hand, for tests of what follows from them."""

from __future__ import annotations

from pathlib import Path

from cluster.config import ClusterConfig, load_config
from cluster.links import Direction, Pair
from proto import control_pb2
from tests.node_process import write_cluster


def three_nodes(directory: Path, **values: object) -> ClusterConfig:
    """mini1, mini2 and mini3."""
    nodes = ({"name": f"mini{n}", "host": f"mini{n}.local"} for n in (1, 2, 3))
    return load_config(write_cluster(directory, "model", *nodes, **values))


def path(round_trip_ms: float = 1.0, gbit_s: float = 10.0, **values: object) -> control_pb2.LinkPath:
    """A way that was measured."""
    fields = {"ip": "10.0.0.2", "kind": "ethernet", "interface": "en0", "mtu": 1500, **values}
    return control_pb2.LinkPath(
        round_trip_p50_ms=round_trip_ms,
        round_trip_p99_ms=2 * round_trip_ms,
        bandwidth_gbit_s=gbit_s,
        **fields,
    )


def pair(
    config: ClusterConfig,
    a: int,
    b: int,
    there: control_pb2.LinkPath | str,
    back: control_pb2.LinkPath | str | None = None,
) -> Pair:
    """A link between two ranks; a text is why a direction could not be measured."""

    def direction(source: int, target: int, found: control_pb2.LinkPath | str) -> Direction:
        nodes = config.nodes
        if isinstance(found, str):
            return Direction(nodes[source], nodes[target], failure=found)
        return Direction(nodes[source], nodes[target], (found,))

    return Pair(direction(a, b, there), direction(b, a, there if back is None else back))
