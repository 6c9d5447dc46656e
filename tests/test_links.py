"""Nodes that are asked to measure the links between them: what they refuse and what they say.

All in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cluster import link_probe
from cluster.config import ClusterConfig, load_config
from cluster.control import ControlService
from cluster.errors import UserError
from cluster.link_service import ProbeService
from cluster.links import Measurement, measure_links
from cluster.node import Node
from cluster.probe import this_machine
from cluster.rpc import connect, make_server
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc, ring_pb2
from tests.node_process import node, write_cluster
from tests.relay import Relay, Shape

TOKEN = "token"


class Served:
    """A node with all that measures, and without a ring."""

    def __init__(
        self, config: ClusterConfig, rank: int, credentials: Credentials | str | None = TOKEN
    ) -> None:
        self.node = Node(config, rank, credentials=credentials, import_base_rss_bytes=0)
        self.service = ControlService(self.node, this_machine())
        add: Callable[[grpc.Server], None] = lambda server: (  # noqa: E731
            control_pb2_grpc.add_ControlServicer_to_server(self.service, server)
        )
        probes = ProbeService(self.service.measurer.accept, 5)
        self.address = config.nodes[rank].address
        self.server, _ = make_server(self.address, [add, probes.add_to], credentials, max_workers=8)
        self.server.start()

    def measure(self, **values: object) -> list[control_pb2.LinkReport]:
        """Its reports of measuring towards rank 1."""
        nodes = self.node.config.nodes
        fields = {"to_rank": 1, "to_address": nodes[1].address, **values}
        with connect(self.address, TOKEN) as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            return list(stub.MeasureLink(control_pb2.MeasureLinkRequest(**fields), timeout=20.0))

    def close(self) -> None:
        self.service.close()
        self.server.stop(0).wait()
        self.node.close(1.0)


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    return load_config(write_cluster(tmp_path, "model", *(node(name=f"n{n}") for n in range(3))))


@pytest.fixture
def pair(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Served]]:
    """Ranks 0 and 1; nobody is rank 2."""
    monkeypatch.setattr(link_probe, "ROUND_TRIPS_S", 0.2)
    monkeypatch.setattr(link_probe, "BULK_S", 0.3)
    served = Served(config, 0), Served(config, 1)
    yield served
    for one in served:
        one.close()


def measured(config: ClusterConfig, token: str = TOKEN) -> tuple[Measurement, list[str]]:
    said: list[str] = []
    return measure_links(config, token, is_forced=False, say=said.append), said


def details(error: pytest.ExceptionInfo[grpc.RpcError]) -> str:
    call = error.value
    assert isinstance(call, grpc.Call)
    return call.details() or ""


def busy(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if two requests ran there."""
    monkeypatch.setattr(one.node, "status", lambda: control_pb2.NodeStatus(num_sessions=2))


@pytest.mark.usefixtures("pair")
def test_each_pair_is_measured_in_both_directions(config: ClusterConfig) -> None:
    found, said = measured(config)
    first, *others = found.pairs
    assert (first.names, first.reasons) == (("n0", "n1"), ())
    assert 0 < first.latency_ms < 10
    assert first.bandwidth_gbit_s > 0.1
    nobody = f"nobody listens at {config.nodes[2].address}; is the node running there?"
    assert [pair.reasons for pair in others] == [
        (f"{name} to n2: {nobody}", f"n2 to {name}: {nobody}") for name in ("n0", "n1")
    ]
    assert not found.is_complete
    assert set(found.profiles) == {0, 1}
    assert said[3:5] == ["n0 measures its way to n1 at 127.0.0.1", "n1 measures its way to n0 at 127.0.0.1"]


def test_a_direction_through_a_relay_is_slower(
    config: ClusterConfig, pair: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = config.nodes[1].port
    with Relay(("127.0.0.1", port), to_target=Shape(20, 10e6), to_client=Shape(20)) as relay:
        monkeypatch.setenv("MACRAME_FAULT", f"edges_via=1@{relay.port}")
        found, *_ = measured(config)[0].pairs
    assert found.there.best is not None
    assert found.back.best is not None
    assert 20 <= found.latency_ms < 70
    assert found.there.best.bandwidth_gbit_s == pytest.approx(0.08, rel=0.4)
    assert found.back.best.round_trip_p50_ms < 20
    assert found.back.best.bandwidth_gbit_s > 0.2


def test_what_was_measured_is_remembered_for_edges(pair: tuple[Served, Served]) -> None:
    *_, last = pair[0].measure()
    assert [path.ip for path in last.paths] == ["127.0.0.1"]
    assert pair[0].node.links._measured[1]["127.0.0.1"] is not None


def test_running_requests_are_not_disturbed(
    config: ClusterConfig, pair: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(pair[1], monkeypatch)
    with pytest.raises(UserError) as caught:
        measured(config)
    assert str(caught.value) == (
        "requests are running on n1 (2), which a measurement would disturb; wait until they are done, or "
        "measure with --anyway"
    )
    sentence = "n1 works on 2 requests, which a measurement would disturb; wait until they are done, or"
    with pytest.raises(grpc.RpcError) as refused:
        pair[1].measure(to_rank=0, to_address=config.nodes[0].address)
    assert details(refused).startswith(sentence)
    *_, last = pair[0].measure()
    assert last.paths[0].reason.startswith(f"{pair[1].address} refused: {sentence}")
    *_, last = pair[0].measure(is_forced=True)
    assert last.paths[0].reason == ""


@pytest.mark.parametrize(
    "values",
    [{"to_rank": 0}, {"to_rank": 7}, {"to_address": "10.0.0.9:50051"}],
    ids=["self", "nobody", "other"],
)
def test_what_a_node_cannot_measure(pair: tuple[Served, Served], values: dict[str, object]) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        pair[0].measure(**values)
    assert details(refused).startswith(f"n0 knows rank {values.get('to_rank', 1)} as ")
    assert details(refused).endswith("copy the config that the ring runs with")


def test_one_measurement_at_a_time(pair: tuple[Served, Served]) -> None:
    pair[0].service.measurer._lock.acquire()
    with pytest.raises(grpc.RpcError) as refused:
        pair[0].measure()
    assert details(refused) == "n0 is measuring already; try again soon"
    pair[0].service.measurer._lock.release()


def test_a_node_lets_only_its_own_ring_measure(pair: tuple[Served, Served]) -> None:
    accept, digest = pair[1].service.measurer.accept, pair[1].node.config.digest
    assert accept(ring_pb2.Hello(config_digest=digest, to_rank=1)) is None
    assert accept(ring_pb2.Hello(config_digest=digest, to_rank=2)) == "rank 1 answers there, not rank 2"
    refusal = accept(ring_pb2.Hello(config_digest="other", to_rank=1))
    assert refusal is not None
    assert refusal.startswith("n1 runs with another config (digest ")


def test_a_wrong_token_is_told(config: ClusterConfig, pair: tuple[Served, Served]) -> None:
    found, _ = measured(config, token="wrong")
    assert (
        found.pairs[0].there.reason == f"n0 to n1: {pair[0].address} has another token; use that of the ring"
    )


def test_a_server_that_is_no_node_is_told(config: ClusterConfig) -> None:
    server, _ = make_server(config.nodes[0].address, [], None, max_workers=2)
    server.start()
    found, _ = measured(config)
    assert found.pairs[0].there.reason.endswith(
        "is no macrame node, or one of an older version; install the same on every node"
    )
    server.stop(0).wait()


def test_a_host_name_that_a_node_cannot_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = (node(name="n0"), node(name="n1", host="no-such-host.invalid"))
    one = Served(load_config(write_cluster(tmp_path, "model", *nodes)), 0)
    *_, last = one.measure()
    assert last.paths[0].reason.startswith("the host name 'no-such-host.invalid' cannot be resolved on n0: ")
    one.close()
