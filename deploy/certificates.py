"""Which certificates a config needs, what stands in its folder, and making what is missing or near its end.

One thread. Nothing is made that is right already, so a second run changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cluster.certificate import (
    NodeIdentity,
    addresses,
    dns_names,
    is_signed_by,
    parse_certificates,
    read_identity,
)
from cluster.config import ClusterConfig, ConfigError, NodeConfig
from cluster.config_security import SecurityConfig, TlsFiles, tls_files
from deploy.authority import (
    NODE_LIFE,
    Authority,
    alternative_names,
    make_authority,
    read_authority,
    write_atomically,
)

RENEW_BEFORE = timedelta(days=60)  # twice as early as the nodes begin to warn
USUAL = SecurityConfig(tls_ca="certs/ca.pem", tls_cert="certs/{name}.pem", tls_key="certs/{name}.key")


@dataclass(frozen=True, slots=True)
class Standing:
    """One node's certificate as it is: why it should be made (empty: it is right), and its end."""

    node: NodeConfig
    files: TlsFiles
    need: str
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class CertificateFolder:
    """The paths of a config's certificates on the machine that makes them."""

    config: ClusterConfig
    security: SecurityConfig

    @property
    def ca_file(self) -> Path:
        return self.files(self.config.nodes[0]).ca

    def files(self, node: NodeConfig) -> TlsFiles:
        """Where a node's three files are."""
        found = tls_files(self.security, self.config.model_dir_base, node.rank, node.name)
        assert found is not None
        return found

    def standings(self, now: datetime) -> list[Standing]:
        """How every node's certificate stands. Raises ConfigError for files of another CA."""
        if not self.ca_file.exists():
            found = next((p for n in self.config.nodes if (p := self.files(n).cert).exists()), None)
            if found is not None:
                raise ConfigError(
                    f"{found} is there, but its CA {self.ca_file} is not: copy the CA back, or move the "
                    "certificates away to begin anew"
                )
        return [self._standing(node, now) for node in self.config.nodes]

    def _standing(self, node: NodeConfig, now: datetime) -> Standing:
        files = self.files(node)
        if not files.cert.exists():
            return Standing(node, files, "missing")
        self._refuse_other_ca(files)
        try:
            held = read_identity(files)
        except ConfigError:
            return Standing(node, files, _why_unusable(files))
        return Standing(node, files, _why_renew(held, node, now), held.expires_at)

    def _refuse_other_ca(self, files: TlsFiles) -> None:
        authorities = parse_certificates(files.ca, _read(files.ca))
        cert = parse_certificates(files.cert, _read(files.cert))[0]
        if not any(is_signed_by(cert, authority) for authority in authorities):
            raise ConfigError(
                f"{files.cert} is of another cluster's CA than {files.ca}: keep each cluster's certificates "
                "in a folder of its own (security.tls), or move the wrong ones away"
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def folder_of(config: ClusterConfig) -> CertificateFolder:
    """As the config says, else certs/ beside it. Raises ConfigError where nodes would share a file."""
    security = config.security if config.security.has_tls else USUAL
    folder = CertificateFolder(config, security)
    for kind in ("cert", "key"):
        taken: dict[Path, str] = {}
        for node in config.nodes:
            path = getattr(folder.files(node), kind)
            if path in taken:
                raise ConfigError(
                    f"{config.path}: security.tls.{kind} is {path} for {taken[path]!r} and for "
                    f"{node.name!r}: "
                    "put {name} into it, so that each node has its own"
                )
            taken[path] = node.name
    return folder


def make(
    folder: CertificateFolder,
    authorities: Path,
    now: datetime,
    *,
    again: Collection[str] = (),
    life: timedelta = NODE_LIFE,
    is_new_ca: bool = False,
) -> list[Standing]:
    """Makes the CA if there is none, and what the nodes need; `need` then says why each was made.

    again: names of nodes that get a new key and certificate in any case; is_new_ca: all do, of a new CA, so
    that what the old one signed is refused. Cut short, it is to be run again. Raises ConfigError.
    """
    if is_new_ca:
        authority = make_authority(authorities, folder.ca_file, now)
        nodes = folder.config.nodes
        return [_made(authority, Standing(n, folder.files(n), "of the new CA"), now, life) for n in nodes]
    standings = [
        replace(s, need=s.need or "asked for") if s.node.name in again else s for s in folder.standings(now)
    ]
    if not any(s.need for s in standings) and folder.ca_file.exists():
        return standings
    authority = _authority(folder, authorities, now)
    return [_made(authority, s, now, life) if s.need else s for s in standings]


def _authority(folder: CertificateFolder, authorities: Path, now: datetime) -> Authority:
    if folder.ca_file.exists():
        return read_authority(authorities, folder.ca_file, now)
    return make_authority(authorities, folder.ca_file, now)


def _made(authority: Authority, standing: Standing, now: datetime, life: timedelta) -> Standing:
    pair = authority.issue(standing.node, now, life)
    write_atomically(standing.files.key, pair.key, is_private=True)
    write_atomically(standing.files.cert, pair.cert)  # after its key: a run cut short here makes both again
    return replace(standing, expires_at=read_identity(standing.files).expires_at)


def _why_unusable(files: TlsFiles) -> str:
    if not files.key.exists():
        return "its key is missing"
    if files.key.stat().st_mode & 0o077:
        return "others could read its key"
    return "certificate and key do not fit"


def _why_renew(held: NodeIdentity, node: NodeConfig, now: datetime) -> str:
    if held.expires_at <= now:
        return "expired"
    if held.expires_at - now < RENEW_BEFORE:
        return "near its end"
    wanted = {str(name.value) for name in alternative_names(node)}
    if not wanted <= {*dns_names(held.cert), *addresses(held.cert)}:
        return "the node has another host now"
    return ""
