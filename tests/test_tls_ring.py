"""Whole rings of real processes that talk over mutual TLS."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.config import load_config
from cluster.errors import EXIT_USAGE
from cluster.rpc import connect
from cluster.tls import Credentials, Tls, own_credentials
from deploy.certs import main as certs
from proto import control_pb2, control_pb2_grpc
from tests.certificates import DAY, NOW, Cluster
from tests.node_process import finish, node, start_node, write_cluster
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint
from tests.waiting import wait_for

LAYERS = [(0, 2), (2, 4), (4, 5)]
PATHS = {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "certs/{name}.key"}
QUIET = {"GRPC_VERBOSITY": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


class TlsRing(RingProcesses):
    """A ring with TLS, and this test as one more node of its cluster."""

    def __init__(self, directory: Path, model: Path, **options: Any) -> None:
        security = {"security": {"tls": PATHS}}
        super().__init__(directory, model, LAYERS, env=QUIET, **{**security, **options})
        self.certs = Cluster(directory / "certs")
        for rank in range(len(LAYERS)):
            self.certs.node(f"n{rank}")
        self.asker = Credentials(None, self.certs.tls("asker"))

    @contextmanager
    def channel(self, rank: int = 0) -> Iterator[grpc.Channel]:
        with connect(f"127.0.0.1:{self.ports[rank]}", self.asker, f"n{rank}") as channel:
            yield channel

    def health(self) -> dict[str, Any]:
        """The body of /health, whatever its status."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.api_port}/health", timeout=20) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            with error:
                return dict(json.load(error))
        except OSError:  # not up yet
            return {}

    def assert_quiet(self) -> None:
        """What gRPC's C code prints of handshakes is in no log."""
        for rank in range(len(LAYERS)):
            assert "ssl_" not in self.log(rank)
            assert "SSL" not in self.log(rank)


def test_a_ring_over_tls_answers_and_refuses_strangers(tmp_path: Path, model: Path) -> None:
    """Edges, control, head and the HTTP process; the API itself is as without TLS."""
    other = Cluster(tmp_path / "other")
    ring = TlsRing(tmp_path, model, with_api=True)
    ring.certs.node("n1", life=20 * DAY)
    with ring:
        url = ring.wait_api()
        assert len(ring.tokens([5, 6, 7], 4)) == 4
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 3
        for rank in range(len(LAYERS)):
            for stranger in (None, Credentials("token", Tls(other.node(f"n{rank}")))):
                with connect(f"127.0.0.1:{ring.ports[rank]}", stranger) as channel:
                    with pytest.raises(grpc.RpcError) as caught:
                        control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        told = ring.node_status(1)
        assert told.certificate_ends_s == int((NOW + 20 * DAY).timestamp())
        assert f"n1.pem expires on {NOW + 20 * DAY:%Y-%m-%d}, in 19 days" in told.certificate_warning
        assert told.certificate_warning in ring.log(1)
        assert ring.node_status(2).certificate_warning == ""
        ring.assert_quiet()


def test_a_certificate_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    """One process: the sentence and exit code 3, before anything is loaded."""
    certs = Cluster(tmp_path / "certs")
    config = write_cluster(tmp_path, "m", node(name="n0"), security={"tls": PATHS})
    certs.expired("n0")
    ended = finish(start_node("--rank", 0, "--config", config))
    assert (ended.code, ended.sentence) == (
        EXIT_USAGE,
        f"run_node: {certs.files('n0').cert} expired on {NOW - 10 * DAY:%Y-%m-%d}: make new ones with "
        "'macrame certs make' and copy them to their nodes",
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("of another CA", "shows a certificate that is not of this cluster's CA: copy there what"),
        ("without TLS", "does not speak TLS: set security.tls in its config, as it is here"),
    ],
)
def test_health_says_whose_certificate_is_wrong(tmp_path: Path, model: Path, kind: str, reason: str) -> None:
    ring = TlsRing(tmp_path, model, with_api=True)
    try:
        ring.start(0)
        ring.wait_listening(0)
        ring.start(1)
        ring.wait_listening(1)
        good = ring.config_path.read_text()
        if kind == "without TLS":
            ring.config_path.write_text(json.dumps({**ring.config, "security": {}}))
        else:
            theirs = Cluster(tmp_path / "other")
            theirs.node("n2")
            paths = {key: path.replace("certs", "other") for key, path in PATHS.items()}
            ring.config_path.write_text(json.dumps({**ring.config, "security": {"tls": paths}}))
        ring.start(2)
        ring.wait_listening(2)
        ring.config_path.write_text(good)
        wanted = f"rank 2 (n2, 127.0.0.1:{ring.ports[2]}) {reason}"
        ring.wait_status(lambda s: s.ranks[2].reason.startswith(wanted) and wanted in s.reason)
        wait_for(lambda: len(ring.health().get("nodes", [])) == 3, 60.0)
        told = ring.health()
        assert told["status"] == "starting"
        assert told["nodes"][2]["state"] == "unreachable"
        assert told["nodes"][2]["reason"].startswith(wanted)
        assert f"starting: {wanted}" in ring.log(0)
        ring.assert_quiet()
    finally:
        ring.stop()


def takes(ring: TlsRing, rank: int) -> bool:
    """Whether the node and this test accept each other's certificates now."""
    try:
        return ring.node_status(rank).rank == rank
    except grpc.RpcError:
        return False


@pytest.mark.long
def test_a_ring_takes_renewed_certificates_and_another_ca(tmp_path: Path, model: Path) -> None:
    """All files are replaced under a serving ring; then nodes are restarted, so that edges are made anew."""
    with TlsRing(tmp_path, model, with_api=True) as ring:
        ring.wait_api()
        tokens = ring.tokens([5, 6, 7], 4)
        shutil.rmtree(tmp_path / "certs" / "authorities")
        new = Cluster(tmp_path / "certs")
        for rank in range(len(LAYERS)):
            new.node(f"n{rank}")
        new.node("asker")
        ring.asker = Credentials(None, Tls(new.files("asker")))
        for rank in range(len(LAYERS)):
            wait_for(lambda rank=rank: takes(ring, rank), 10.0)  # a node looks once a second
        assert ring.tokens([5, 6, 7], 4) == tokens
        ring.kill(1)
        ring.wait_status(lambda status: status.status == "degraded")
        ring.start(1)
        ring.wait_ok()
        assert ring.tokens([5, 6, 7], 4) == tokens
        ring.kill(0)
        ring.start(0)
        ring.wait_api()
        assert ring.tokens([5, 6, 7], 4) == tokens
        ring.assert_quiet()


@pytest.mark.long
def test_a_lost_nodes_certificate_is_refused_after_a_new_ca(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`macrame certs renew-ca` under a serving ring, then each node is started again."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with TlsRing(tmp_path, model) as ring:
        ring.wait_ok()
        lost = ring.asker
        assert takes(ring, 1)
        tokens = ring.tokens([5, 6, 7], 4)
        assert certs(["renew-ca", "--config", str(ring.config_path)]) == 0
        ring.asker = own_credentials(load_config(ring.config_path))
        for rank in range(len(LAYERS)):
            wait_for(lambda rank=rank: takes(ring, rank), 10.0)  # without a restart
        assert ring.tokens([5, 6, 7], 4) == tokens
        for rank in reversed(range(len(LAYERS))):
            ring.kill(rank)
        for rank in range(len(LAYERS)):
            ring.start(rank)
        ring.wait_ok()
        assert ring.tokens([5, 6, 7], 4) == tokens
        for rank in range(len(LAYERS)):
            with (
                connect(f"127.0.0.1:{ring.ports[rank]}", lost, f"n{rank}") as channel,
                pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
            ):
                control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20.0)
