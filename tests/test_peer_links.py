"""Which way to a peer is preferred: by kind, by measurement, and never where another machine may answer."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from cluster import peer_links
from cluster.config import load_config
from cluster.interfaces import Interface
from cluster.peer_links import MAX_ADDRESSES, Measured, PeerLinks, Place, Way, by_speed, own_addresses
from cluster.rpc import make_server
from proto import control_pb2, control_pb2_grpc
from tests.edges import free_port
from tests.node_process import write_cluster

HERE = (
    Interface("lo", "loopback", 65536, 0, (ipaddress.ip_interface("127.0.0.1/8"),)),
    Interface("en0", "wifi", 1500, 600, (ipaddress.ip_interface("192.168.1.5/24"),)),
    Interface("en1", "ethernet", 1500, 1000, (ipaddress.ip_interface("10.0.0.5/24"),)),
    Interface("bridge0", "thunderbolt", 9000, 0, (ipaddress.ip_interface("169.254.1.5/16"),)),
    Interface("docker0", "virtual", 1500, 0, (ipaddress.ip_interface("172.17.0.1/16"),)),
)
WIFI, CABLE, BOLT, DOCKER = "192.168.1.6", "10.0.0.6", "169.254.1.6", "172.17.0.6"


def told(
    ip: str, kind: str = "ethernet", *, is_bound: bool = True, interface: str = "en5"
) -> control_pb2.NodeAddress:
    return control_pb2.NodeAddress(ip=ip, kind=kind, is_bound=is_bound, interface=interface, mtu=1400)


ALL = (told(WIFI, "wifi"), told(CABLE), told(BOLT, "thunderbolt"))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A Mac with three links and Docker; what its name server says."""
    names = {"mini2.local": [WIFI], "nobody.local": []}

    def interface_to(ip: str, _port: int) -> tuple[Interface | None, str | None]:
        for interface in HERE:
            for address in interface.addresses:
                if ipaddress.ip_address(ip) in address.network:
                    return interface, str(address.ip)
        return None, None

    def resolve(host: str) -> list[str]:
        if names.get(host) == []:
            raise OSError("nodename nor servname provided")
        return names.get(host, [host])

    monkeypatch.setattr(peer_links, "read_interfaces", lambda: HERE)
    monkeypatch.setattr(peer_links, "interface_to", interface_to)
    monkeypatch.setattr(peer_links, "resolve", resolve)
    return names


def links(directory: Path, host: str = "mini2.local", *addresses: control_pb2.NodeAddress) -> PeerLinks:
    nodes = ({"host": "mini1.local"}, {"host": host, "port": 50051})
    found = PeerLinks(load_config(write_cluster(directory, "model", *nodes)), None)
    found.tell(1, addresses)  # even none: then nobody is asked
    return found


def ips(ways: list[Way]) -> list[str]:
    return [way.ip for way in ways]


def test_ways_come_in_the_order_of_their_kinds(tmp_path: Path) -> None:
    ways = links(tmp_path, "mini2.local", *ALL).ways(1)
    assert ips(ways) == [BOLT, CABLE, WIFI]
    assert [way.is_named for way in ways] == [False, False, True]
    assert (ways[0].interface, ways[0].peer_interface, ways[0].mtu) == ("bridge0", "en5", 1400)
    assert ways[1].speed_mbit_s == 1000
    assert ways[0].address == f"{BOLT}:50051"


def test_among_equals_the_configs_host_comes_first(tmp_path: Path) -> None:
    found = links(tmp_path, "10.0.0.9", told(CABLE), told("10.0.0.9"))
    assert ips(found.ways(1)) == ["10.0.0.9", CABLE]


def test_a_cable_that_ends_at_a_wifi_is_wifi(tmp_path: Path) -> None:
    assert [way.kind for way in links(tmp_path, CABLE, told(CABLE, "wifi")).ways(1)] == ["wifi"]


def test_an_address_in_a_network_of_others_does_not_count(tmp_path: Path) -> None:
    """It might be another machine's, which would be shown the token."""
    assert ips(links(tmp_path, "mini2.local", told("10.9.9.9"), told("fd00::1")).ways(1)) == [WIFI]


def test_an_address_that_this_machine_has_too_leads_to_itself(tmp_path: Path) -> None:
    assert ips(links(tmp_path, "mini2.local", told("172.17.0.1", "virtual")).ways(1)) == [WIFI]


def test_where_a_node_does_not_listen_does_not_count(tmp_path: Path) -> None:
    assert ips(links(tmp_path, "mini2.local", told(BOLT, "thunderbolt", is_bound=False)).ways(1)) == [WIFI]


def test_virtual_addresses_count_where_there_is_nothing_else(tmp_path: Path) -> None:
    assert ips(links(tmp_path, CABLE, told(DOCKER, "virtual"), told(CABLE)).ways(1)) == [CABLE]
    assert ips(links(tmp_path, "nobody.local", told(DOCKER, "virtual")).ways(1)) == [DOCKER]


def test_a_name_that_means_nothing_here_is_no_hindrance_if_the_node_told_its_address(tmp_path: Path) -> None:
    assert ips(links(tmp_path, "nobody.local", told(CABLE)).ways(1)) == [CABLE]
    with pytest.raises(OSError, match="nodename"):
        links(tmp_path, "nobody.local").ways(1)


def test_loopback_is_the_only_way_to_a_node_on_this_machine(tmp_path: Path) -> None:
    found = links(tmp_path, "127.0.0.1", told(CABLE), told(BOLT))
    assert ips(found.ways(1)) == ["127.0.0.1"]
    assert found.places(1) == [Place("127.0.0.1:50051", kind="loopback")]


@pytest.mark.parametrize(
    "bad",
    [
        told("mini2.local"),
        told("127.0.0.1"),
        told("0.0.0.0"),
        told("224.0.0.1"),
        told("fe80::1"),
        told(CABLE, "carrier pigeon"),
        told(CABLE, interface="x" * 65),
        told(CABLE, interface="en0\x1b[2J"),
    ],
)
def test_what_cannot_be_an_address_of_another_node_is_not_taken(
    tmp_path: Path, bad: control_pb2.NodeAddress
) -> None:
    assert ips(links(tmp_path, "mini2.local", bad).ways(1)) == [WIFI]


def test_only_so_many_addresses_are_looked_at(tmp_path: Path) -> None:
    many = [told(f"10.0.0.{n}") for n in range(10, 10 + 2 * MAX_ADDRESSES)]
    assert len(links(tmp_path, "nobody.local", *many).ways(1)) == MAX_ADDRESSES


def test_an_edge_tries_the_best_place_first_and_the_configs_own_last(tmp_path: Path) -> None:
    assert links(tmp_path, "mini2.local", *ALL).places(1) == [
        Place(f"{BOLT}:50051", "bridge0", "thunderbolt"),
        Place(f"{CABLE}:50051", "en1", "ethernet"),
        Place(f"{WIFI}:50051", "en0", "wifi"),
        Place("mini2.local:50051"),
    ]
    assert [p.address for p in links(tmp_path, WIFI, *ALL).places(1)] == [
        f"{BOLT}:50051",
        f"{CABLE}:50051",
        f"{WIFI}:50051",
    ]


def test_a_peer_with_one_address_is_where_the_config_says(tmp_path: Path) -> None:
    assert links(tmp_path).places(1) == [Place("mini2.local:50051")]
    assert links(tmp_path, "mini2.local", ALL[0]).places(1) == [Place("mini2.local:50051", "en0", "wifi")]
    assert links(tmp_path, WIFI, ALL[0]).places(1) == [Place(f"{WIFI}:50051", "en0", "wifi")]


def test_a_node_that_the_head_did_not_tell_of_is_asked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Control(control_pb2_grpc.ControlServicer):
        num_asked = 0

        def Profile(  # noqa: N802
            self, request: control_pb2.ProfileRequest, context: grpc.ServicerContext
        ) -> control_pb2.NodeProfile:
            self.num_asked += 1
            return control_pb2.NodeProfile(addresses=ALL)

    monkeypatch.setattr(peer_links, "is_loopback", lambda _host: False)
    control, port = Control(), free_port()
    nodes = ({"host": "mini1.local"}, {"host": "127.0.0.1", "port": port})
    found = PeerLinks(load_config(write_cluster(tmp_path, "model", *nodes)), "token")
    assert [place.address for place in found.places(1)] == [f"127.0.0.1:{port}"], "nobody is there yet"
    add: Callable[[grpc.Server], None] = lambda s: (  # noqa: E731
        control_pb2_grpc.add_ControlServicer_to_server(control, s)
    )
    server, _ = make_server(f"127.0.0.1:{port}", [add], "token", max_workers=2)
    server.start()
    for _ in range(2):
        assert {place.kind for place in found.places(1)} >= {"thunderbolt", "ethernet", "wifi"}
    assert control.num_asked == 1
    server.stop(0).wait()


def test_what_was_measured_comes_before_the_kind(tmp_path: Path) -> None:
    found = links(tmp_path, "mini2.local", *ALL)
    found.remember(1, {BOLT: None, CABLE: Measured(2.0, 1.0), WIFI: Measured(0.5, 1.0)})
    order = [place.address.partition(":")[0] for place in found.places(1)]
    assert order == [WIFI, CABLE, BOLT, "mini2.local"]


def test_a_small_gain_does_not_change_the_order(tmp_path: Path) -> None:
    ways = links(tmp_path, "mini2.local", *ALL).ways(1)
    near = {BOLT: Measured(1.0, 10.0), CABLE: Measured(0.95, 10.0), WIFI: Measured(3.0, 0.1)}
    assert ips(by_speed(ways, near)) == [BOLT, CABLE, WIFI]
    clear = near | {CABLE: Measured(0.5, 10.0)}
    assert ips(by_speed(ways, clear)) == [CABLE, BOLT, WIFI]
    assert ips(by_speed(ways, {WIFI: Measured(9.0, 0.1)})) == [WIFI, BOLT, CABLE]


def test_bandwidth_counts_as_a_frame_needs_it() -> None:
    assert Measured(1.0, 1.0).frame_ms == pytest.approx(1.0 + 65536 * 8 / 1e6)


# -- what a node tells of itself --------------------------------------------------------------------------
def test_a_node_tells_its_addresses_and_where_it_listens() -> None:
    found = {a.ip: a for a in own_addresses("10.0.0.5")}
    assert set(found) == {"10.0.0.5", "192.168.1.5", "169.254.1.5", "172.17.0.1"}
    assert [ip for ip, a in found.items() if a.is_bound] == ["10.0.0.5"]
    assert (found["169.254.1.5"].kind, found["169.254.1.5"].interface) == ("thunderbolt", "bridge0")


def test_a_name_with_several_addresses_is_bound_to_all(machine: dict[str, list[str]]) -> None:
    machine["mini1.local"] = ["10.0.0.5", "169.254.1.5"]
    bound = {a.ip for a in own_addresses("mini1.local") if a.is_bound}
    assert bound == {"10.0.0.5", "169.254.1.5"}
    assert all(a.is_bound for a in own_addresses("0.0.0.0"))


def test_a_node_on_loopback_tells_nothing(machine: dict[str, list[str]]) -> None:
    assert own_addresses("127.0.0.1") == []
    assert not any(a.is_bound for a in own_addresses("nobody.local"))


def test_names_are_resolved_by_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert peer_links.resolve("127.0.0.1") == ["127.0.0.1"]
    with pytest.raises(OSError, match="no host name"):
        peer_links.resolve("a" * 70)
    assert socket.gethostname()
