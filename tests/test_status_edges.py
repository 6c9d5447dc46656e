"""What `macrame status` says of the ways between nodes."""

from __future__ import annotations

from typing import Any

from deploy.status_edges import render_edges


def node(rank: int, *edges: dict[str, Any]) -> dict[str, Any]:
    return {"rank": rank, "node": {"edges": list(edges)}}


def edge(
    to_rank: int, address: str, kind: str = "", interface: str = "", *, is_up: bool = True
) -> dict[str, Any]:
    return {"to_rank": to_rank, "address": address, "kind": kind, "interface": interface, "is_up": is_up}


def test_each_edge_that_leaves_its_machine_has_a_line() -> None:
    nodes = [
        node(0, edge(1, "169.254.3.4:50051", "thunderbolt", "bridge0"), edge(2, "x:1", is_up=False)),
        node(1, edge(2, "mini3.local:50051")),
        node(2, edge(0, "127.0.0.1:50051", "loopback", "lo")),
    ]
    assert render_edges(nodes) == [
        "rank 0 sends to rank 1 at 169.254.3.4:50051 (Thunderbolt bridge0)",
        "rank 1 sends to rank 2 at mini3.local:50051",
    ]


def test_wifi_is_no_way_to_be_content_with() -> None:
    assert render_edges([node(1, edge(0, "10.0.0.2:50051", "wifi", "en0"))]) == [
        "rank 1 sends to rank 0 at 10.0.0.2:50051 (Wi-Fi en0): macrame links says what a cable would gain"
    ]


def test_a_node_of_an_older_version_says_nothing() -> None:
    assert render_edges([{"rank": 0, "node": {}}]) == []
