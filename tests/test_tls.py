"""Mutual TLS between real gRPC servers and channels: who gets in, who does not, and renewed files."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cluster import tls as tls_module
from cluster.config_security import TlsFiles
from cluster.ring import EdgeSender
from cluster.rpc import BindError, connect, make_server
from cluster.tls import Credentials, Tls
from proto import ring_pb2
from tests.certificates import DAY, NOW, Cluster, Unchecked
from tests.edges import TOKEN, Receiver
from tests.test_rpc import SHAPES, Echo, call, serve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def own(tmp_path: Path) -> Cluster:
    """For tests that change files."""
    return Cluster(tmp_path / "certs")


def ask(port: int, credentials: Credentials | None, peer: str | None = "mini2") -> bytes:
    with connect(f"127.0.0.1:{port}", credentials, peer) as channel:
        return call(channel, "unary_unary")


def refused(port: int, credentials: Credentials | None, peer: str | None = "mini2") -> str:
    with pytest.raises(grpc.RpcError) as caught:
        ask(port, credentials, peer)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


@pytest.mark.parametrize("shape", SHAPES)
def test_nodes_of_one_ca_talk(certs: Cluster, shape: str) -> None:
    both = Credentials(None, certs.tls("mini2")), Credentials(None, certs.tls("mini1"))
    with serve([Echo().add_to], both[0]) as port:
        with connect(f"127.0.0.1:{port}", both[1], "mini2") as channel:
            assert call(channel, shape) == b"hello"
        with connect(f"127.0.0.1:{port}", both[1]) as channel:  # by the address that it is for
            assert call(channel, shape) == b"hello"


def test_every_stranger_is_refused_in_the_handshake(certs: Cluster, tmp_path: Path) -> None:
    other = Cluster(tmp_path / "other")
    alone = certs.node("alone", signer=other.authority)
    strangers = {
        "of another CA, trusting ours": Credentials("s3cret", Unchecked(alone)),
        "of another cluster": Credentials("s3cret", Unchecked(other.node("mini1"))),
        "self-signed": Credentials("s3cret", Unchecked(certs.self_signed("mini1"))),
        "expired": Credentials("s3cret", Unchecked(certs.expired("old"))),
        "from the future": Credentials("s3cret", Unchecked(certs.not_yet_valid("young"))),
        "without TLS": Credentials("s3cret"),
    }
    echo = Echo()
    with serve([echo.add_to], Credentials("s3cret", certs.tls("mini2"))) as port:
        for name, stranger in strangers.items():
            assert refused(port, stranger), name
        with grpc.secure_channel(
            f"127.0.0.1:{port}", grpc.ssl_channel_credentials(certs.ca_file.read_bytes())
        ) as channel:  # trusts our CA and has no certificate
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, "unary_unary", (("authorization", "Bearer s3cret"),))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert echo.num_calls == 0
        assert ask(port, Credentials("s3cret", certs.tls("mini1"))) == b"hello"


@pytest.mark.parametrize("kind", ["expired", "not_yet_valid", "other", "plain"])
def test_a_client_refuses_a_server_that_cannot_prove_itself(
    certs: Cluster, tmp_path: Path, kind: str
) -> None:
    if kind == "other":
        shown = Unchecked(certs.node("wrong", signer=Cluster(tmp_path / "other").authority, of="mini2"))
    elif kind == "plain":
        shown = None
    else:
        shown = Unchecked(getattr(certs, kind)("mini2"))
    echo = Echo()
    with serve([echo.add_to], Credentials(None, shown)) as port:
        assert refused(port, Credentials("s3cret", certs.tls("mini1")))
    assert echo.num_calls == 0


def test_another_node_of_the_cluster_is_not_taken_for_the_one_that_was_meant(certs: Cluster) -> None:
    with serve([Echo().add_to], Credentials(None, certs.tls("mini3"))) as port:
        assert "Hostname Verification" in refused(port, Credentials(None, certs.tls("mini1")), "mini2")


def test_a_certificate_that_grpc_does_not_take(certs: Cluster) -> None:
    """A CA's own is for signing alone. (Reading the files finds that earlier: it is for no node.)"""
    (key,) = (certs.folder / "authorities").rglob("ca.key")
    shown = Unchecked(TlsFiles("mini2", certs.ca_file, certs.ca_file, key))
    with pytest.raises(BindError, match=r"cannot listen on .*: gRPC does not take the certificate of"):
        make_server("127.0.0.1:0", [], Credentials(None, shown), max_workers=1)


def test_the_token_is_asked_for_besides(certs: Cluster) -> None:
    with serve([Echo().add_to], Credentials("s3cret", certs.tls("mini2"))) as port:
        with (
            connect(f"127.0.0.1:{port}", Credentials("wrong", certs.tls("mini1")), "mini2") as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            call(channel, "unary_unary")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_frames_go_over_tls_and_a_refused_edge_says_why(certs: Cluster, tmp_path: Path) -> None:
    receiver = Receiver(Credentials(TOKEN, certs.tls("mini2")))
    try:
        with edge(receiver, Credentials(TOKEN, certs.tls("mini1"))) as (sender, up):
            assert up.wait(5)
            assert sender.send(ring_pb2.Frame(kind=ring_pb2.STEP, epoch=3, seq=9))
            assert receiver.frames.get(timeout=20).frame.seq == 9
        stranger = Tls(Cluster(tmp_path / "other").node("mini1"))
        with edge(receiver, Credentials(TOKEN, stranger)) as (sender, up):
            wanted = f"rank 2 at {receiver.address} shows a certificate that is not of this cluster's CA"
            pause = threading.Event()
            while not sender.waiting_for.startswith(wanted):
                assert not up.is_set()
                pause.wait(0.02)
    finally:
        receiver.close()


@contextlib.contextmanager
def edge(receiver: Receiver, credentials: Credentials) -> Iterator[tuple[EdgeSender, threading.Event]]:
    up = threading.Event()
    sender = EdgeSender(
        receiver.address,
        credentials,
        ring_pb2.Hello(epoch=3, from_rank=1, to_rank=2),
        peer="mini2",
        on_up=up.set,
        on_down=lambda _reason: None,
        on_refused=lambda _reason: None,
        beat=ring_pb2.Beat,
    )
    try:
        yield sender, up
    finally:
        sender.close()


# -- renewal ----------------------------------------------------------------------------------------------
def test_renewed_files_count_for_new_connections_without_a_restart(
    own: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's certificate first, then the CA and both: what was connected stays connected."""
    monkeypatch.setattr(tls_module, "LOOK_EVERY_S", 0.0)
    server, client = own.tls("mini2"), own.tls("mini1")
    with (
        serve([Echo().add_to], Credentials(None, server)) as port,
        connect(f"127.0.0.1:{port}", Credentials(None, client), "mini2") as standing,
    ):
        assert call(standing, "unary_unary") == b"hello"
        before = shown_by(own, port)
        own.node("mini2")
        assert ask(port, Credentials(None, client)) == b"hello"
        assert shown_by(own, port) != before

        stranger = Credentials(None, Tls(own.node("mini1")))
        new = Cluster(own.folder)  # another CA in the same file
        own.node("mini2", signer=new.authority)
        assert refused(port, stranger)
        own.node("mini1", signer=new.authority)
        assert ask(port, Credentials(None, client)) == b"hello"
        assert call(standing, "unary_unary") == b"hello"


def shown_by(own: Cluster, port: int) -> bytes:
    """What a client sees of the server, with a handshake of Python's own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    files = own.files("mini1")
    context.load_cert_chain(files.cert, files.key)
    with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain) as secured:
        shown = secured.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def test_what_cannot_be_used_is_not_taken_over(
    own: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls_module, "LOOK_EVERY_S", 0.0)
    tls = own.tls("mini1")
    before = tls.current()
    own.node("mini1", signer=Cluster(tmp_path / "other").authority)
    assert tls.current() is before
    assert tls.current() is before
    assert len(caplog.messages) == 1  # said once, not in each handshake
    assert "the certificate read before stays in use: " in caplog.text
    assert "is not of the CA in" in caplog.text
    own.expired("mini1")
    assert tls.current() is before
    assert "expired on" in caplog.messages[-1]
    own.files("mini1").key.unlink()
    assert tls.current() is before
    own.node("mini1")
    assert tls.current() is not before


def test_without_tls_the_code_for_certificates_is_not_loaded() -> None:
    code = "import sys, cluster.membership, cluster.api.head_client; print('cryptography' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "False\n"


def test_files_are_looked_at_once_a_second_at_most(own: Cluster) -> None:
    tls = own.tls("mini1")
    before = tls.current()
    own.node("mini1")
    assert tls.current() is before


def test_a_certificate_near_its_end_warns_once_a_day(own: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert own.tls("mini1").warning() == ""
    tls = Tls(own.node("mini2", life=29 * DAY))
    for _ in range(3):
        assert f"mini2.pem expires on {NOW + 29 * DAY:%Y-%m-%d}, in 28 days: make new ones" in tls.warning()
    assert len(caplog.messages) == 1
