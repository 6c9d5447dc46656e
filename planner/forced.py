"""Layers that the user forces onto nodes: checked against the model and each other. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from planner.node_profile import NodeProfile


class ForcedLayersError(ValueError):
    """Forced layers that overlap, leave a gap that no node may fill, or exceed the model; one sentence."""


def check_forced(nodes: Sequence[NodeProfile], num_layers: int) -> dict[int, tuple[int, int]]:
    """The forced ranges [start, stop) of the nodes in use, by index. Raises ForcedLayersError."""
    forced = {i: node.layers for i, node in enumerate(nodes) if node.use and node.layers is not None}
    at, before = 0, ""
    gaps = []
    for i, (start, stop) in sorted(forced.items(), key=lambda item: item[1]):
        name = nodes[i].name
        if stop > num_layers or not 0 <= start < stop:
            raise ForcedLayersError(
                f"layers {start}:{stop} of {name} exceed the model, which has the layers 0:{num_layers}"
            )
        if start < at:
            raise ForcedLayersError(
                f"layers {start}:{stop} of {name} overlap those of {before}, which end at {at}"
            )
        if start > at:
            gaps.append(f"{at}:{start}")
        at, before = stop, name
    if forced and at < num_layers:
        gaps.append(f"{at}:{num_layers}")
    num_free = sum(1 for node in nodes if node.use and node.layers is None)
    if forced and len(gaps) > num_free:
        raise ForcedLayersError(
            f"layers {', '.join(gaps)} are forced onto no node: give them to one, "
            "or leave as many nodes as there are gaps without layers"
        )
    return forced
