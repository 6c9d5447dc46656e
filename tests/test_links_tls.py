"""`macrame links` in a cluster with certificates: whose certificate the command shows, and ways over TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import link_probe
from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.config_security import TlsFiles
from cluster.links import measure_links
from cluster.tls import Credentials, Tls, own_credentials
from tests.certificates import Cluster
from tests.node_process import node, write_cluster
from tests.test_links import Served

PATHS = {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "certs/{name}.key"}


@pytest.fixture
def certs(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "certs")


@pytest.fixture
def config(tmp_path: Path, certs: Cluster) -> ClusterConfig:
    nodes = [node(name=f"n{n}") for n in range(2)]
    return load_config(write_cluster(tmp_path, "m", *nodes, security={"tls": PATHS}))


def test_links_are_measured_over_tls(
    config: ClusterConfig, certs: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_probe, "ROUND_TRIPS_S", 0.2)
    monkeypatch.setattr(link_probe, "BULK_S", 0.3)
    served = [Served(config, rank, Credentials(None, certs.tls(f"n{rank}"))) for rank in range(2)]
    try:
        ours = own_credentials(config)
        found = measure_links(config, ours, is_forced=False, say=lambda _line: None)
        assert found.is_complete
        assert found.pairs[0].latency_ms > 0
        other = Cluster(tmp_path / "other")
        strangers = Credentials(None, Tls(other.node("n0")))
        found = measure_links(config, strangers, is_forced=False, say=lambda _line: None)
        there = found.pairs[0].there.reason
        assert f"{served[0].address} shows a certificate that is not of this cluster's CA" in there
    finally:
        for one in served:
            one.close()


def test_a_command_shows_the_certificate_whose_key_is_here(config: ClusterConfig, certs: Cluster) -> None:
    with pytest.raises(
        ConfigError, match=r"no key of security\.tls is on this machine: run this on a node, or"
    ):
        own_credentials(config)
    certs.node("n1")
    tls = own_credentials(config).tls
    assert tls is not None
    assert tls.current().files == TlsFiles("n1", certs.ca_file, certs.files("n1").cert, certs.files("n1").key)


def test_without_tls_it_shows_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_TOKEN", "t")
    assert own_credentials(load_config(write_cluster(tmp_path, "m", node()))) == Credentials("t")
