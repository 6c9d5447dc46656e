"""Real CAs and node certificates for tests, right and wrong ones, by the code that makes a user's own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.config import NodeConfig
from cluster.config_security import TlsFiles, file_stem, identity
from cluster.tls import Tls
from deploy.authority import SLACK, Authority, make_authority, write_atomically

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
EARLY = NOW + 10 * DAY - SLACK  # when a certificate of `not_yet_valid` begins


class Cluster:
    """A CA in a folder of its own, and the certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_file = folder / "ca.pem"
        self.authority = make_authority(folder / "authorities", self.ca_file, NOW - 1000 * DAY)

    def files(self, name: str) -> TlsFiles:
        stem = file_stem(name)
        return TlsFiles(name, self.ca_file, self.folder / f"{stem}.pem", self.folder / f"{stem}.key")

    def node(
        self,
        name: str,
        *,
        begin: datetime = NOW,
        life: timedelta = 365 * DAY,
        signer: Authority | None = None,
        of: str | None = None,
    ) -> TlsFiles:
        """Writes a node's pair; `signer`: another CA than this cluster's, `of`: another node's name in it."""
        files = self.files(name)
        node = NodeConfig(0, of or name, "127.0.0.1")
        pair = (signer or self.authority).issue(node, begin, life)
        write_atomically(files.key, pair.key, is_private=True)
        write_atomically(files.cert, pair.cert)
        return files

    def self_signed(self, name: str) -> TlsFiles:
        """For nobody but itself: signed by its own key."""
        files, key = self.files(name), ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = (
            x509.CertificateBuilder(
                subject, subject, key.public_key(), x509.random_serial_number(), NOW, NOW + DAY
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(identity(name))]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        write_atomically(files.key, key.private_bytes(pem, pkcs8, plain), is_private=True)
        write_atomically(files.cert, cert.public_bytes(pem))
        return files

    def expired(self, name: str) -> TlsFiles:
        return self.node(name, begin=NOW - 20 * DAY, life=10 * DAY)

    def not_yet_valid(self, name: str) -> TlsFiles:
        return self.node(name, begin=NOW + 10 * DAY)

    def tls(self, name: str) -> Tls:
        """A right certificate, ready for use."""
        return Tls(self.node(name))


class Unchecked(Tls):
    """Shows whatever its files hold, as a stranger's program would: without a look at time and signer."""

    def __init__(self, files: TlsFiles) -> None:
        self._pems = (files.ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes())

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(*self._pems)

    def server_credentials(self) -> grpc.ServerCredentials:
        ca, key, cert = self._pems
        return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
