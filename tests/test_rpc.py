"""Servers that own their port, and the token on every kind of call."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cluster.rpc import BindError, PortBusy, connect, format_address, make_server, split_address
from cluster.tls import Credentials
from proto import control_pb2, control_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
TOKEN_SENTENCE = "the cluster token is missing or wrong; give every node and client the same token file"
SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Echo:
    """A raw-bytes method of each shape, and how often any of them ran."""

    def __init__(self) -> None:
        self.num_calls = 0

    def add_to(self, server: grpc.Server) -> None:
        handlers = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self._one),
            "unary_stream": grpc.unary_stream_rpc_method_handler(lambda m, c: iter([self._one(m, c)])),
            "stream_unary": grpc.stream_unary_rpc_method_handler(lambda ms, c: self._one(b"".join(ms), c)),
            "stream_stream": grpc.stream_stream_rpc_method_handler(
                lambda ms, c: (self._one(m, c) for m in ms)
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))

    def _one(self, message: bytes, _context: object) -> bytes:
        self.num_calls += 1
        return message


class Control(control_pb2_grpc.ControlServicer):
    """A generated service: its handlers are registered with the server in another way."""

    def Status(self, request: control_pb2.StatusRequest, context: object) -> control_pb2.NodeStatus:  # noqa: N802
        return control_pb2.NodeStatus(rank=7)


@contextlib.contextmanager
def serve(
    services: list[Callable[[grpc.Server], None]],
    token: Credentials | str | None = None,
    address: str = "127.0.0.1:0",
    max_workers: int = 4,
) -> Iterator[int]:
    server, port = make_server(address, services, token, max_workers=max_workers)
    server.start()
    try:
        yield port
    finally:
        assert server.stop(0).wait(10.0)


def call(channel: grpc.Channel, shape: str, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
    method = getattr(channel, shape)(f"/test.Echo/{shape}")
    given = iter([b"hello"]) if shape.startswith("stream") else b"hello"
    reply = method(given, timeout=5, metadata=metadata)
    return b"".join(reply) if shape.endswith("stream") else reply


# -- token ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_call_needs_the_token(shape: str) -> None:
    echo = Echo()
    with serve([echo.add_to], "s3cret") as port:
        for token, metadata in (
            (None, ()),
            ("wrong", ()),
            ("s3cret2", ()),
            ("s3cre", ()),
            (None, (("authorization", "s3cret"),)),
            (None, (("authorization", "bearer s3cret"),)),
            (None, (("authorization", "Bearer s3cret"), ("authorization", "Bearer s3cret"))),
        ):
            with connect(f"127.0.0.1:{port}", token) as channel, pytest.raises(grpc.RpcError) as caught:
                call(channel, shape, metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert caught.value.details() == TOKEN_SENTENCE
        assert echo.num_calls == 0
        with connect(f"127.0.0.1:{port}", "s3cret") as channel:
            assert call(channel, shape, (("another", "entry"),)) == b"hello"
        assert echo.num_calls == 1


def test_generated_services_need_the_token_too() -> None:
    add = control_pb2_grpc.add_ControlServicer_to_server
    with serve([lambda server: add(Control(), server)], "s3cret") as port:
        with connect(f"127.0.0.1:{port}", "wrong") as channel, pytest.raises(grpc.RpcError) as caught:
            control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with connect(f"127.0.0.1:{port}", "s3cret") as channel:
            assert (
                control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20).rank
                == 7
            )


def test_a_stranger_who_sends_nothing_holds_no_worker() -> None:
    """Each opens a call and sends no request; with one worker, a single held one would block the rest."""
    echo = Echo()
    with serve([echo.add_to], "s3cret", max_workers=1) as port, connect(f"127.0.0.1:{port}", None) as channel:
        silence = threading.Event()

        def nothing() -> Iterator[bytes]:
            silence.wait(10)
            yield from ()

        calls = [
            channel.stream_unary("/test.Echo/stream_unary").future(nothing(), timeout=20) for _ in range(3)
        ]
        codes = {each.code() for each in calls}
        silence.set()
        assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        with connect(f"127.0.0.1:{port}", "s3cret") as good:
            assert call(good, "unary_unary") == b"hello"


def test_without_a_token_no_token_is_asked() -> None:
    with serve([Echo().add_to]) as port, connect(f"127.0.0.1:{port}", "any") as channel:
        assert call(channel, "unary_unary") == b"hello"


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    with serve([Echo().add_to], "tök") as port, connect(f"127.0.0.1:{port}", "x") as channel:
        with pytest.raises(grpc.RpcError):
            call(channel, "unary_unary")
        assert compared == [(b"Bearer x", "Bearer tök".encode())]


# -- ports ------------------------------------------------------------------------------------------------
def test_a_port_of_our_own_that_is_busy_is_named() -> None:
    with serve([]) as port, pytest.raises(PortBusy) as caught:
        make_server(f"127.0.0.1:{port}", [], None, max_workers=1)
    assert str(caught.value) == (
        f"port {port} of 127.0.0.1 is in use by another process; stop it, or choose another port "
        "in the config"
    )


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0"])
def test_a_port_that_is_busy_on_one_address_is_busy(host: str) -> None:
    """gRPC alone would listen on the other addresses and say nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(PortBusy):
        make_server(f"{host}:{other.getsockname()[1]}", [], None, max_workers=1)


def test_the_port_is_free_again_at_once() -> None:
    echo = Echo()
    with serve([echo.add_to]) as port, connect(f"127.0.0.1:{port}", None) as channel:
        call(channel, "unary_unary")
    with serve([echo.add_to], address=f"127.0.0.1:{port}") as again:
        assert again == port


def test_an_address_of_another_machine() -> None:
    with pytest.raises(BindError, match=r"this machine cannot listen on 192\.0\.2\.1:50051: .*assign"):
        make_server("192.0.2.1:50051", [], None, max_workers=1)
    with pytest.raises(BindError, match=r"the host name 'no-such-host\.invalid' cannot be resolved"):
        make_server("no-such-host.invalid:50051", [], None, max_workers=1)


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6")
def test_ipv6() -> None:
    with serve([Echo().add_to], address="[::1]:0") as port, connect(f"[::1]:{port}", None) as channel:
        assert call(channel, "unary_unary") == b"hello"


def test_addresses() -> None:
    assert format_address("mini1.local", 50051) == "mini1.local:50051"
    assert format_address("fe80::1", 50051) == "[fe80::1]:50051"
    assert split_address("[fe80::1]:50051") == ("fe80::1", 50051)
    assert split_address("mini1.local:0") == ("mini1.local", 0)
    with pytest.raises(ValueError, match="'mini1' is not host:port"):
        split_address("mini1")


# -- limits -----------------------------------------------------------------------------------------------
def test_calls_beyond_the_workers_are_refused_at_once() -> None:
    release, entered = threading.Event(), threading.Semaphore(0)

    class Slow(Echo):
        def _one(self, message: bytes, _context: object) -> bytes:
            entered.release()
            release.wait(60)
            return message

    with (
        serve([Slow().add_to], max_workers=2) as port,
        connect(f"127.0.0.1:{port}", None) as channel,
    ):
        method = channel.unary_unary("/test.Echo/unary_unary")
        held = [method.future(b"", timeout=60) for _ in range(2)]
        for _ in held:
            assert entered.acquire(timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            method(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        release.set()
        assert [each.result(20) for each in held] == [b"", b""]


def test_messages_above_4_mib_are_refused() -> None:
    with serve([Echo().add_to]) as port, connect(f"127.0.0.1:{port}", None) as channel:
        method = channel.unary_unary("/test.Echo/unary_unary")
        assert len(method(bytes((4 << 20) - 100), timeout=20)) == (4 << 20) - 100
        with pytest.raises(grpc.RpcError) as caught:
            method(bytes((4 << 20) + 1), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serve([Echo().add_to]) as port, connect(f"127.0.0.1:{port}", None) as channel:
        assert call(channel, "unary_unary") == b"hello"


def test_nothing_is_written_to_the_terminal() -> None:
    """Refused connections, random bytes, a peer that leaves: gRPC's own log lines are not for our users."""
    script = """
import socket, grpc
from proto import control_pb2, control_pb2_grpc
from cluster.rpc import connect, make_server
def status(address, token):
    with connect(address, token) as channel:
        try:
            control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=20)
        except grpc.RpcError as error:
            return error.code().name
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    closed = free.getsockname()[1]
assert status(f"127.0.0.1:{closed}", None) == "UNAVAILABLE"
server, port = make_server("127.0.0.1:0", [], "token", max_workers=2)
server.start()
assert status(f"127.0.0.1:{port}", "wrong") == "UNAUTHENTICATED"
assert status(f"127.0.0.1:{port}", "token") == "UNIMPLEMENTED"
with socket.create_connection(("127.0.0.1", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n" + bytes(range(256)) * 40)
    while stranger.recv(4096):
        pass
assert status(f"127.0.0.1:{port}", "token") == "UNIMPLEMENTED"
server.stop(0).wait(10.0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
