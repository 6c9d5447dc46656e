"""Why a TLS connection to a peer does not come about, in one sentence: a handshake of our own tells.

gRPC says only "Socket closed" to a client whose certificate was refused.
Any thread; a call takes up to 2 x LIMIT_S where the peer is frozen.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.config_security import identity
from cluster.tls import Credentials, Tls

if TYPE_CHECKING:
    from cryptography import x509

LIMIT_S = 1.0
# The numbers that OpenSSL gives to what is wrong with a certificate (x509_vfy.h).
_EXPIRED, _NOT_YET_VALID, _WRONG_NAME = 10, 9, (62, 64)
_STRANGERS = frozenset((2, 18, 19, 20, 21, 7))  # no issuer found, self-signed, a wrong signature
_HTTP2_OPENING = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
)  # and empty SETTINGS, RFC 9113 3.4
_HANDSHAKES = ("handshake", "Socket closed", "erification", "recvmsg", "reset", "Stream removed")


def handshake_trouble(
    address: str, credentials: Credentials | str | None, label: str, peer: str | None, details: str = ""
) -> str:
    """The sentence, beginning with `label`; empty where TLS is not what is wrong.

    peer: the node's name in the config; None: what answers must be for the address itself.
    details: what gRPC said; a refused connection is no matter of TLS.
    """
    if details and not any(word in details for word in _HANDSHAKES):
        return ""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    tls = Credentials.of(credentials).tls
    try:
        with socket.create_connection((host, int(port)), LIMIT_S) as connection:
            connection.settimeout(LIMIT_S)
            if tls is None:
                return _without_tls(connection, label)
            return _with_tls(connection, tls, label, identity(peer) if peer is not None else host)
    except OSError:  # nobody there, or frozen
        return ""


def _without_tls(connection: socket.socket, label: str) -> str:
    with contextlib.suppress(ssl.SSLError), _wrapped(connection, _lenient(), ""):
        return f"{label} wants certificates, and this side has none: set security.tls in the config here too"
    return ""


def _with_tls(connection: socket.socket, tls: Tls, label: str, name: str) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    shown, place = tls.current(), connection.getpeername()
    try:
        context.load_verify_locations(cadata=shown.ca_pem.decode("ascii", "replace"))
        context.load_cert_chain(shown.files.cert, shown.files.key)
    except ssl.SSLError:  # being replaced just now
        return ""
    try:
        with _wrapped(connection, context, name) as secured:
            secured.sendall(_HTTP2_OPENING)
            is_taken = bool(secured.recv(1))
    except ssl.SSLCertVerificationError as error:
        return _certificate_trouble(error, place, label)
    except TimeoutError:
        return ""
    except (ssl.SSLEOFError, ConnectionError):
        is_taken = False
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return f"{label} does not speak TLS: set security.tls in its config, as it is here"
        is_taken = False
    if is_taken:
        return ""
    return (
        f"{label} does not take the certificate of {shown.files.name} in {shown.files.cert}: give both "
        "certificates of one CA, and see that their clocks are right"
    )


def _certificate_trouble(error: ssl.SSLCertVerificationError, place: tuple[str, int], label: str) -> str:
    from cluster.certificate import RENEW, day, dns_names

    cert = _shown_by(place)
    if error.verify_code == _EXPIRED:
        when = f" on {day(cert.not_valid_after_utc)}" if cert is not None else ""
        return f"{label} shows a certificate that expired{when}: {RENEW}"
    if error.verify_code == _NOT_YET_VALID:
        when = f" on {day(cert.not_valid_before_utc)}" if cert is not None else " later"
        return f"{label} shows a certificate whose time begins{when}: set the clocks of both machines"
    if error.verify_code in _WRONG_NAME:
        whose = ", ".join(dns_names(cert)) if cert is not None else ""
        return (
            f"{label} shows the certificate of {whose or 'somebody else'}: give each node its own, and see "
            "that the config's hosts are right"
        )
    if error.verify_code in _STRANGERS:
        return (
            f"{label} shows a certificate that is not of this cluster's CA: copy there what 'macrame certs "
            "make' made for it"
        )
    return f"{label} shows a certificate that cannot be used: {error.verify_message}"


def _shown_by(place: tuple[str, int]) -> x509.Certificate | None:
    """The certificate, unverified, to name its dates and names."""
    from cryptography import x509

    with (
        contextlib.suppress(OSError, ValueError),
        socket.create_connection(place[:2], LIMIT_S) as connection,
        _wrapped(connection, _lenient(), "") as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown) if shown else None
    return None


def _lenient() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@contextlib.contextmanager
def _wrapped(connection: socket.socket, context: ssl.SSLContext, name: str) -> Iterator[ssl.SSLSocket]:
    connection.settimeout(LIMIT_S)
    with context.wrap_socket(connection, server_hostname=name or None) as secured:
        yield secured
