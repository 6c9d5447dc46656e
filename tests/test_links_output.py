"""What `macrame links` prints: the table, what is odd about a link, and entries for a cluster file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.links import Measurement
from cluster.links_output import config_links, pair_objects, render_links
from proto import control_pb2
from tests.measured_links import pair, path, three_nodes


def test_a_link_is_as_slow_as_its_slower_direction(tmp_path: Path) -> None:
    found = pair(three_nodes(tmp_path), 0, 1, path(0.61234, 9.4), path(0.8, 4.0))
    assert (found.latency_ms, found.bandwidth_gbit_s) == (0.4, 4.0)
    assert found.ranks == {0, 1}


def test_entries_have_the_configs_form_and_three_digits(tmp_path: Path) -> None:
    config = three_nodes(tmp_path)
    found = Measurement((pair(config, 0, 1, path(0.61234, 9.41234)), pair(config, 0, 2, "it is off")))
    assert config_links(found) == [
        {"between": ["mini1", "mini2"], "latency_ms": 0.306, "bandwidth_gbit_s": 9.41}
    ]
    assert not found.is_complete
    three_nodes(tmp_path, links=config_links(found))  # can be read


def test_the_table_has_a_line_for_each_link(tmp_path: Path) -> None:
    config = three_nodes(tmp_path)
    way = path(0.62, 9.4, kind="thunderbolt", interface="bridge0", peer_interface="bridge0", ip="169.254.3.4")
    header, _, row = render_links(Measurement((pair(config, 0, 1, way),)))
    assert header.split() == ["link", "by", "address", "round", "trip", "p99", "there", "back", "MTU"]
    for text in (
        "mini1 - mini2",
        "Thunderbolt bridge0",
        "169.254.3.4",
        "0.62 ms",
        "1.24 ms",
        "9.4 Gbit/s",
        "1500",
    ):
        assert text in row


def test_a_pair_that_could_not_be_measured_is_a_line_with_the_reason(tmp_path: Path) -> None:
    config = three_nodes(tmp_path)
    failed = control_pb2.LinkPath(ip="10.0.0.3", kind="ethernet", reason="nobody listens at 10.0.0.3:50051")
    lines = render_links(Measurement((pair(config, 0, 2, failed, "mini3.local:50051 does not answer"),)))
    assert lines == [
        "mini1 - mini3 could not be measured: mini1 to mini3: nobody listens at 10.0.0.3:50051",
        "mini1 - mini3 could not be measured: mini3 to mini1: mini3.local:50051 does not answer",
    ]


def test_other_ways_and_the_preferred_one_are_told(tmp_path: Path) -> None:
    found = pair(three_nodes(tmp_path), 0, 1, path(0.5, 9.0, ip="10.0.0.2"))
    slow = path(8.0, 0.2, ip="192.168.1.6", kind="wifi", interface="en1")
    there = replace(found.there, paths=(*found.there.paths, slow))
    lines = render_links(Measurement((replace(found, there=there),)))
    assert "mini1 to mini2 also by 192.168.1.6 (Wi-Fi en1): round trip 8.00 ms, 0.2 Gbit/s" in lines
    assert "mini1 to mini2 prefers 10.0.0.2 (Ethernet en0) when the ring connects anew" in lines


def test_an_uneven_link_is_told(tmp_path: Path) -> None:
    lines = render_links(Measurement((pair(three_nodes(tmp_path), 0, 1, path(1, 9.0), path(1, 2.0)),)))
    assert lines[-1] == "mini2 to mini1 has 2 Gbit/s, the other way 9: the plan reckons with the slower one"


def test_a_better_interface_that_nobody_uses_is_told(tmp_path: Path) -> None:
    config = three_nodes(tmp_path)
    told = control_pb2.NodeProfile(
        addresses=[
            control_pb2.NodeAddress(ip="169.254.7.7", interface="bridge0", kind="thunderbolt"),
            control_pb2.NodeAddress(ip="10.0.0.9", interface="en3", kind="wifi"),
        ]
    )
    lines = render_links(Measurement((pair(config, 0, 1, path(kind="wifi")),), {1: told}))
    assert lines[-1] == (
        "mini2 also has 169.254.7.7 (Thunderbolt bridge0), where it does not listen; to use it, name it as "
        "mini2's host in the config"
    )


def test_json_has_every_direction_and_way(tmp_path: Path) -> None:
    (found,) = pair_objects(Measurement((pair(three_nodes(tmp_path), 0, 1, path(), "it is off"),)))
    assert found["between"] == ["mini1", "mini2"]
    assert found["reasons"] == ["mini2 to mini1: it is off"]
    there, back = found["directions"]
    assert (there["from"], there["to"], there["paths"][0]["kind"]) == ("mini1", "mini2", "ethernet")
    assert back["paths"] == []
