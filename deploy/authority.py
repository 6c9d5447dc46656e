"""A cluster's own CA: making it, keeping its key on this machine, and signing node certificates with it.

ECDSA with P-256 and SHA-256, profiles as of RFC 5280. The caller brings the time. One thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.certificate import common_name, day, fingerprint, key_of, parse_certificates, read_private
from cluster.config import ConfigError, NodeConfig
from cluster.config_security import identity
from shard_loader.whole_file import write_whole

CA_LIFE = timedelta(days=3653)
NODE_LIFE = timedelta(days=365)
SLACK = timedelta(hours=1)  # clocks of the nodes may differ by so much
_MAX_COMMON_NAME = 64


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, both as PEM."""

    cert: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA whose key is here."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def issue(self, node: NodeConfig, now: datetime, life: timedelta = NODE_LIFE) -> Pair:
        """A new key and certificate for both ends of the node's connections; never outlives the CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        until = min(now + life, self.cert.not_valid_after_utc)
        signer = self.cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        cert = (
            _builder(node.name, self.cert.subject, key, now - SLACK, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(alternative_names(node)), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )
        return Pair(cert.public_bytes(serialization.Encoding.PEM), _private_bytes(key))


def alternative_names(node: NodeConfig) -> list[x509.GeneralName]:
    """What a node may be reached as: its identity, which nodes check, and the host of the config."""
    names: list[x509.GeneralName] = [x509.DNSName(identity(node.name))]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(node.host)))
    except ValueError:
        with contextlib.suppress(ValueError):  # a host that DNS cannot carry stands for itself alone
            names.append(x509.DNSName(node.host.lower().rstrip(".").encode("idna").decode()))
    return names


def make_authority(folder: Path, ca_file: Path, now: datetime) -> Authority:
    """A new CA: its key into `folder`, its certificate into `ca_file`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = f"macrame cluster CA {secrets.token_hex(4)}"
    cert = (
        _builder(subject, None, key, now - SLACK, now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_atomically(key_file(folder, cert), _private_bytes(key), is_private=True)
    write_atomically(ca_file, cert.public_bytes(serialization.Encoding.PEM))
    return Authority(cert, key)


def read_authority(folder: Path, ca_file: Path, now: datetime) -> Authority:
    """The CA in `ca_file` with its key from `folder`. Raises ConfigError where it cannot sign."""
    cert = parse_certificates(ca_file, ca_file.read_bytes())[0]
    path = key_file(folder, cert)
    if not path.exists():
        raise ConfigError(
            f"the key of {common_name(cert)} ({ca_file}) is not on this machine: run this where that CA was "
            f"made, which keeps it in {path}, or move {ca_file} and the certificates beside it away and "
            "begin anew"
        )
    pem = read_private(path, "the key of the CA")
    if key_of(path, pem) != cert.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    ):
        raise ConfigError(f"{path} is not the key of {ca_file}: put the right one back, from a backup")
    if cert.not_valid_after_utc < now:
        raise ConfigError(
            f"{common_name(cert)} ({ca_file}) expired on {day(cert.not_valid_after_utc)}: move it and the "
            "certificates beside it away, and make new ones for every node"
        )
    key = serialization.load_pem_private_key(pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Authority(cert, key)


def key_file(folder: Path, cert: x509.Certificate) -> Path:
    """Where the key of this CA is kept."""
    return folder / fingerprint(cert) / "ca.key"


def authorities_folder() -> Path:
    """Where this user's CA keys are, away from what is copied to nodes: under XDG_DATA_HOME, or as usual."""
    given = os.environ.get("XDG_DATA_HOME")
    home = Path.home()
    usual = home / "Library/Application Support" if sys.platform == "darwin" else home / ".local/share"
    return (Path(given) if given else usual) / "macrame" / "authorities"


def write_atomically(path: Path, content: bytes, *, is_private: bool = False) -> None:
    """The whole file or the one before; a private one is never readable by others, not even at first.

    Raises ConfigError where the folder does not let us.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if is_private else 0o755)
        write_whole(path, content, 0o600 if is_private else 0o644)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _builder(
    name: str,
    issuer: x509.Name | None,
    key: ec.EllipticCurvePrivateKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_MAX_COMMON_NAME])])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
