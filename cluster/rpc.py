"""gRPC as this project uses it: options, TLS, the token on each call, servers that own their port.

Any thread.
"""

from __future__ import annotations

import errno
import hmac
import os
import socket
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NoReturn

import grpc

from cluster.config_security import identity
from cluster.heartbeat import SILENCE_LIMIT_S
from cluster.tls import Credentials

MAX_MESSAGE_BYTES = 4 << 20
_SIZES = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_SERVER_OPTIONS = (
    *_SIZES,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
)
_CHANNEL_OPTIONS = (
    *_SIZES,
    ("grpc.use_local_subchannel_pool", 1),  # closing the channel closes its connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_UNAUTHENTICATED = "the cluster token is missing or wrong; give every node and client the same token file"


def keepalive(silence_limit_s: float) -> tuple[tuple[str, int], ...]:
    """The options that find dead peers where no heartbeat of ours does, or later than such.

    Without the ping timeout a frozen peer took 60 s to be noticed. gRPC pings on its own as well, to measure
    a busy connection: a peer that may halt for the silence limit must have the time to answer.
    """
    timeout_ms = int(2000 * max(silence_limit_s, 1.0))
    return (
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
    )


class BindError(Exception):
    """A server could not listen; the message is one sentence."""


class PortBusy(BindError):  # noqa: N818
    """Another process listens on the port already."""


def format_address(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """The host without brackets, and the port; raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        raise ValueError(f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def token_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The call metadata that carries the cluster token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def connect(
    address: str,
    credentials: Credentials | str | None,
    peer: str | None = None,
    *,
    silence_limit_s: float = SILENCE_LIMIT_S,
) -> grpc.Channel:
    """A channel that reconnects within about a second. A text alone is a token; each call carries it.

    With TLS the other side must prove that it is the node `peer` of the config; None: that it is for the
    address.
    """
    shown = Credentials.of(credentials)
    channel = open_channel(address, shown, peer, silence_limit_s)
    return channel if shown.token is None else grpc.intercept_channel(channel, _TokenSender(shown.token))


def open_channel(
    address: str,
    credentials: Credentials | str | None,
    peer: str | None,
    silence_limit_s: float = SILENCE_LIMIT_S,
) -> grpc.Channel:
    """As `connect`, but no call carries the token."""
    tls = Credentials.of(credentials).tls
    options: tuple[tuple[str, int | str], ...] = (*_CHANNEL_OPTIONS, *keepalive(silence_limit_s))
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    options = (*options, *peer_options(peer))
    return grpc.secure_channel(address, tls.channel_credentials(), options=options)


def peer_options(peer: str | None) -> tuple[tuple[str, str], ...]:
    """What a channel with TLS needs to check that it reached this node, at whatever address."""
    return () if peer is None else (("grpc.ssl_target_name_override", identity(peer)),)


def make_server(
    address: str,
    services: Sequence[Callable[[grpc.Server], None]],
    credentials: Credentials | str | None,
    *,
    max_workers: int,
    silence_limit_s: float = SILENCE_LIMIT_S,
) -> tuple[grpc.Server, int]:
    """A server bound to host:port, not started yet, and its port (port 0: a free one).

    Each of `services` adds its handlers to the server. A call beyond `max_workers` at once gets
    RESOURCE_EXHAUSTED, one without the token UNAUTHENTICATED; with TLS a client without a certificate of our
    CA does not get so far. Raises PortBusy or BindError.
    """
    shown = Credentials.of(credentials)
    workers = futures.ThreadPoolExecutor(max_workers, thread_name_prefix="rpc")
    server = grpc.server(
        workers,
        interceptors=[] if shown.token is None else [_TokenCheck(shown.token)],
        options=(*_SERVER_OPTIONS, *keepalive(silence_limit_s)),
        maximum_concurrent_rpcs=max_workers,
    )
    for add_to in services:
        add_to(server)
    tls = None if shown.tls is None else shown.tls.server_credentials()
    port = _bind(server, *split_address(address), tls)
    return _Server(server, workers), port


def _bind(server: grpc.Server, host: str, port: int, tls: grpc.ServerCredentials | None) -> int:
    """Binds every address of the host: gRPC itself is content when one of several works."""
    bound = port
    num_bound = 0
    reason = ""
    unknown = "unknown reason" if tls is None else "gRPC does not take the certificate of security.tls"
    for ip in _resolve(host):
        try:
            place = format_address(ip, bound)
            bound = server.add_insecure_port(place) if tls is None else server.add_secure_port(place, tls)
            num_bound += 1
        except RuntimeError:
            code = _why_not(ip, bound)
            reason = os.strerror(code) if code else unknown
            if code == errno.EADDRINUSE:
                raise PortBusy(
                    f"port {bound} of {host} is in use by another process; stop it, or choose another port "
                    "in the config"
                ) from None
    if num_bound == 0:
        raise BindError(f"this machine cannot listen on {format_address(host, port)}: {reason}")
    return bound


def _resolve(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BindError(f"the host name {host!r} cannot be resolved: {error.strerror}") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _why_not(ip: str, port: int) -> int:
    """The errno of binding this address, which gRPC does not tell; 0: it works now."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
            probe.listen()
        except OSError as error:
            return error.errno or 0
    return 0


class _Server(grpc.Server):
    """A gRPC server whose worker threads end with it."""

    def __init__(self, server: grpc.Server, workers: futures.ThreadPoolExecutor) -> None:
        self._server, self._workers = server, workers

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        self._server.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_insecure_port(self, address: str) -> int:
        return self._server.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        return self._server.add_secure_port(address, server_credentials)

    def start(self) -> None:
        self._server.start()

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        return self._server.wait_for_termination(timeout)

    def stop(self, grace: float | None) -> threading.Event:
        stopped = self._server.stop(grace)
        threading.Thread(target=self._release, args=(stopped,), name="server stop", daemon=True).start()
        return stopped

    def _release(self, stopped: threading.Event) -> None:
        stopped.wait()  # before that, gRPC may still hand calls to the workers
        self._workers.shutdown(wait=False)


class _TokenCheck(grpc.ServerInterceptor):
    """Refuses every call of any service whose metadata lack the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        # A stream handler runs at once, where a unary one would wait for a stranger's request.
        self._refuse: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0].encode(), self._expected):
            return continuation(handler_call_details)
        return self._refuse


def _refuse(_requests: Any, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, _UNAUTHENTICATED)
    raise AssertionError("abort raises")


class _CallDetails(
    namedtuple(
        "_CallDetails", ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression")
    ),
    grpc.ClientCallDetails,
):
    pass


class _TokenSender(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call. (gRPC's own call credentials need TLS, which a cluster may lack.)"""

    def __init__(self, token: str) -> None:
        self._metadata = token_metadata(token)

    def _with_token(self, details: Any) -> Any:
        return _CallDetails(
            details.method,
            details.timeout,
            (*(details.metadata or ()), *self._metadata),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(self._with_token(client_call_details), request_iterator)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(self._with_token(client_call_details), request_iterator)
