"""A node's certificate and key, read and checked before use. Any thread; the caller brings the time.

X.509 as of RFC 5280, by `cryptography`. Every refusal is a ConfigError of one sentence.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.config_read import ConfigError
from cluster.config_security import TlsFiles, identity
from cluster.console import as_word

WARN_BEFORE = timedelta(days=30)
RENEW = "make new ones with 'macrame certs make' and copy them to their nodes"


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """The content of three files that belong together."""

    files: TlsFiles
    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes
    cert: x509.Certificate

    @property
    def expires_at(self) -> datetime:
        return self.cert.not_valid_after_utc

    def check_time(self, now: datetime) -> None:
        """Raises ConfigError outside the certificate's time."""
        if now < self.cert.not_valid_before_utc:
            raise ConfigError(
                f"{self.files.cert} is good from {day(self.cert.not_valid_before_utc)} on, and the clock "
                f"here says {day(now)}: set this machine's clock"
            )
        if now > self.expires_at:
            raise ConfigError(f"{self.files.cert} expired on {day(self.expires_at)}: {RENEW}")

    def warning(self, now: datetime) -> str:
        """A sentence while the certificate is near its end, else empty."""
        left = self.expires_at - now
        if left > WARN_BEFORE:
            return ""
        return f"{self.files.cert} expires on {day(self.expires_at)}, in {max(left.days, 0)} days: {RENEW}"


def read_identity(files: TlsFiles) -> NodeIdentity:
    """Reads and checks the three files against each other, not their time. Raises ConfigError."""
    ca_pem = _read(files.ca, "security.tls.ca")
    cert_pem = _read(files.cert, "security.tls.cert")
    key_pem = read_private(files.key, "security.tls.key")
    authorities = parse_certificates(files.ca, ca_pem)
    cert, *chain = parse_certificates(files.cert, cert_pem)
    if key_of(files.key, key_pem) != _public_bytes(cert):
        raise ConfigError(
            f"{files.key} is not the key of {files.cert}: copy both from where they were made, or make new "
            "ones with 'macrame certs renew'"
        )
    if not _is_issued_by(cert, chain, authorities):
        raise ConfigError(
            f"{files.cert} is not of the CA in {files.ca} ({', '.join(map(common_name, authorities))}): "
            "copy certificate, key and CA of the same cluster"
        )
    if identity(files.name) not in dns_names(cert):
        raise ConfigError(
            f"{files.cert} is not for the node {files.name!r} but for "
            f"{', '.join(dns_names(cert)) or 'nobody'}: each node takes its own ('macrame certs make')"
        )
    missing = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} - _usages(cert)
    if missing:
        raise ConfigError(
            f"{files.cert} may not be used for both ends of a connection: it needs the extended key usages "
            "serverAuth and clientAuth"
        )
    return NodeIdentity(files, ca_pem, cert_pem, key_pem, cert)


def read_private(path: Path, key: str) -> bytes:
    """A file that only its owner may read. Raises ConfigError; `key` is its place in the config."""
    content = _read(path, key)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{path} ({key}) can be read by other users of this machine: run chmod 600 {as_word(path)}, "
            "and make a new key with 'macrame certs renew' if somebody else uses this machine"
        )
    return content


def parse_certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----): put the right file "
            "there, or move it away and run 'macrame certs make' or 'macrame up'"
        ) from None


def key_of(path: Path, pem: bytes) -> bytes:
    """The public half, as DER, of a private key without a password. Raises ConfigError."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path} holds no private key in PEM form without a password (-----BEGIN PRIVATE KEY-----)"
        ) from None
    return key.public_key().public_bytes(_DER, _PUBLIC)


def is_signed_by(cert: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's key signed it, and the names fit."""
    try:
        cert.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def fingerprint(cert: x509.Certificate) -> str:
    """16 hex digits of its SHA-256."""
    return cert.fingerprint(hashes.SHA256()).hex()[:16]


def common_name(cert: x509.Certificate) -> str:
    """The subject's CN, else its fingerprint."""
    names = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else fingerprint(cert)


def dns_names(cert: x509.Certificate) -> list[str]:
    """The DNS names that it is for."""
    names = _alternative_names(cert)
    return names.get_values_for_type(x509.DNSName) if names is not None else []


def addresses(cert: x509.Certificate) -> list[str]:
    """The IP addresses that it is for."""
    names = _alternative_names(cert)
    return [str(a) for a in names.get_values_for_type(x509.IPAddress)] if names is not None else []


def day(moment: datetime) -> str:
    """A date for people, in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d")


def _alternative_names(cert: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _usages(cert: x509.Certificate) -> set[x509.ObjectIdentifier]:
    """Without the extension: all, as RFC 5280 has it."""
    try:
        return set(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def _is_issued_by(
    cert: x509.Certificate, chain: Iterable[x509.Certificate], authorities: list[x509.Certificate]
) -> bool:
    """Directly, or through the certificates that its file goes on with."""
    if any(is_signed_by(cert, authority) for authority in authorities):
        return True
    rest = list(chain)
    issuer = next((one for one in rest if is_signed_by(cert, one)), None)
    if issuer is None:
        return False
    rest.remove(issuer)
    return _is_issued_by(issuer, rest, authorities)


def _public_bytes(cert: x509.Certificate) -> bytes:
    return cert.public_key().public_bytes(_DER, _PUBLIC)


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} ({key}) cannot be read: {error.strerror}; 'macrame certs make' makes it, on one machine "
            "for all"
        ) from None


_DER = serialization.Encoding.DER
_PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo
