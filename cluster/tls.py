"""Mutual TLS of one node: its files as gRPC's credentials, read again when they were replaced. Any thread.

A renewed file counts for every connection that begins afterwards, at servers and at clients. Connections that
stand go on with what they began with: TLS asks for certificates in the handshake only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from cluster.config import ClusterConfig, ConfigError
from cluster.config_security import TlsFiles

if TYPE_CHECKING:  # the code for certificates takes 10 MB: not without TLS
    from cluster.certificate import NodeIdentity

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
WARN_EVERY_S = 86400.0


class Tls:
    """The certificate of this process. Raises ConfigError where it cannot be used now."""

    def __init__(self, files: TlsFiles, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._files, self._clock = files, clock
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._identity = _read(files)
        self._identity.check_time(clock())
        self._looked_at = time.monotonic()
        self._warned_at = -WARN_EVERY_S

    def current(self) -> NodeIdentity:
        """What the files hold; what they held before, while they cannot be used (half copied, for one)."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at >= LOOK_EVERY_S:
                self._looked_at = now
                self._look()
            return self._identity

    def warning(self) -> str:
        """A sentence while the certificate is near its end, else empty; it is logged once a day."""
        text = self.current().warning(self._clock())
        if text and time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            logger.warning("%s", text)
        return text

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is made now: our certificate, and only peers of our CA."""
        identity = self.current()
        return grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.cert_pem)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Every client must show a certificate of our CA; asked for anew in each handshake."""
        shown = self.current()

        def fetch() -> Any:  # None: as before
            nonlocal shown
            identity = self.current()
            if identity is shown:
                return None
            shown = identity
            return _configuration(identity)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown), fetch, require_client_authentication=True
        )

    def _look(self) -> None:
        """With the lock held."""
        stamp = _stamp(self._files)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            identity = _read(self._files)
            identity.check_time(self._clock())
        except ConfigError as error:
            logger.warning("the certificate read before stays in use: %s", error)
            return
        self._identity = identity
        logger.info("%s was renewed", self._files.cert)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a process shows to others and asks of them; without both it talks to anybody (loopback only)."""

    token: str | None = None
    tls: Tls | None = None

    @staticmethod
    def of(value: Credentials | str | None) -> Credentials:
        """A text alone is a token."""
        return value if isinstance(value, Credentials) else Credentials(value)


def load_credentials(config: ClusterConfig, rank: int) -> Credentials:
    """A rank's token and certificate from its own machine's files. Raises ConfigError."""
    files = config.tls_files(rank)
    if files is None:
        return Credentials(config.token())
    tls = Tls(files)
    tls.warning()
    return Credentials(config.token(), tls)


def own_credentials(config: ClusterConfig) -> Credentials:
    """What a command shows that is no node: the certificate of the first rank whose key is on this machine.

    Raises ConfigError where there is none, and for one that cannot be used.
    """
    if not config.security.has_tls:
        return Credentials(config.token())
    for node in config.nodes:
        files = config.tls_files(node.rank)
        if files is not None and files.key.exists():
            return load_credentials(config, node.rank)
    raise ConfigError(
        f"{config.path}: no key of security.tls is on this machine: run this on a node, or where 'macrame "
        "certs' made them"
    )


def _read(files: TlsFiles) -> NodeIdentity:
    from cluster.certificate import read_identity

    return read_identity(files)


def _configuration(identity: NodeIdentity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key_pem, identity.cert_pem)], root_certificates=identity.ca_pem
    )


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int] | None, ...]:
    return tuple(map(_stamp_of, (files.ca, files.cert, files.key)))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
