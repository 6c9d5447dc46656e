"""Why two sides do not come together over TLS, in one sentence, found at real servers."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.rpc import connect, make_server
from cluster.tls import Credentials, Tls
from cluster.tls_trouble import handshake_trouble
from tests.certificates import DAY, EARLY, NOW, Cluster, Unchecked
from tests.test_rpc import Echo, call, serve

LABEL = "rank 1 (mini2)"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("other"))


def trouble(port: int, shown: Tls | None, peer: str | None = "mini2") -> str:
    """What is said after a real gRPC call failed at this port."""
    credentials = Credentials(None, shown)
    address = f"127.0.0.1:{port}"
    with (
        connect(address, credentials, peer) as channel,
        pytest.raises(Exception, match="UNAVAILABLE") as caught,
    ):
        call(channel, "unary_unary")
    details: str = caught.value.details()  # type: ignore[attr-defined]
    return handshake_trouble(address, credentials, LABEL, peer, details)


SERVERS = {
    "expired": rf"shows a certificate that expired on {NOW - 10 * DAY:%Y-%m-%d}: make new ones",
    "early": rf"shows a certificate whose time begins on {EARLY:%Y-%m-%d}: set the clocks of both",
    "another CA's": "shows a certificate that is not of this cluster's CA: copy there what 'macrame",
    "self-signed": "shows a certificate that is not of this cluster's CA: copy there",
    "another node's": r"shows the certificate of mini3\.macrame\.internal: give each node its own",
    "none": "does not speak TLS: set security.tls in its config, as it is here",
}


@pytest.mark.parametrize("kind", SERVERS)
def test_what_is_wrong_with_the_other_side(certs: Cluster, other: Cluster, kind: str) -> None:
    shown: Tls | None = None
    if kind == "expired":
        shown = Unchecked(certs.expired("mini2"))
    elif kind == "early":
        shown = Unchecked(certs.not_yet_valid("mini2"))
    elif kind == "another CA's":
        shown = Tls(other.node("mini2"))
    elif kind == "self-signed":
        shown = Unchecked(certs.self_signed("mini2"))
    elif kind == "another node's":
        shown = certs.tls("mini3")
    with serve([Echo().add_to], Credentials(None, shown)) as port:
        text = trouble(port, certs.tls("mini1"))
    assert re.match(rf"{re.escape(LABEL)} {SERVERS[kind]}", text), text
    assert "\n" not in text


def test_what_is_wrong_with_our_side(certs: Cluster, other: Cluster) -> None:
    """Whose own certificate is refused hears only that the connection closed."""
    with serve([Echo().add_to], Credentials(None, certs.tls("mini2"))) as port:
        stranger = certs.node("mini4", signer=other.authority)
        text = trouble(port, _Shown(stranger))
        assert text == (
            f"{LABEL} does not take the certificate of mini4 in {stranger.cert}: give both certificates of "
            "one CA, and see that their clocks are right"
        )
        assert trouble(port, None) == (
            f"{LABEL} wants certificates, and this side has none: set security.tls in the config here too"
        )


class _Shown(Unchecked):
    """A stranger that can say what it shows."""

    def __init__(self, files: object) -> None:
        super().__init__(files)  # type: ignore[arg-type]
        self.files = files

    def current(self) -> object:  # type: ignore[override]
        return SimpleNamespace(files=self.files, ca_pem=self._pems[0])


def test_where_tls_is_not_what_is_wrong(certs: Cluster) -> None:
    ours = Credentials(None, certs.tls("mini1"))
    with serve([Echo().add_to], Credentials(None, certs.tls("mini2"))) as port:
        assert handshake_trouble(f"127.0.0.1:{port}", ours, LABEL, "mini2") == ""
    assert handshake_trouble(f"127.0.0.1:{port}", ours, LABEL, "mini2") == ""  # nobody is there any more
    assert handshake_trouble("127.0.0.1:1", ours, LABEL, "mini2", "Connection refused") == ""
    with serve([Echo().add_to]) as port:
        assert handshake_trouble(f"127.0.0.1:{port}", None, LABEL, "mini2") == ""


def test_a_frozen_peer_holds_nobody_up(certs: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tls_trouble.LIMIT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for credentials in (None, Credentials(None, certs.tls("mini1"))):
            assert handshake_trouble(address, credentials, LABEL, "mini2") == ""


def test_an_ipv6_address(certs: Cluster, other: Cluster) -> None:
    server, port = make_server("[::1]:0", [], Credentials(None, other.tls("mini2")), max_workers=1)
    server.start()
    try:
        ours = Credentials(None, certs.tls("mini1"))
        assert "not of this cluster's CA" in handshake_trouble(f"[::1]:{port}", ours, LABEL, "mini2")
    finally:
        assert server.stop(0).wait(10.0)


def test_a_file_in_the_middle_of_being_replaced_is_no_ones_fault(certs: Cluster, tmp_path: Path) -> None:
    own = Cluster(tmp_path)
    ours = Credentials(None, own.tls("mini1"))
    own.files("mini1").key.write_text("half")
    with serve([Echo().add_to], Credentials(None, certs.tls("mini2"))) as port:
        assert handshake_trouble(f"127.0.0.1:{port}", ours, LABEL, "mini2") == ""
