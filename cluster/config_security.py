"""What a cluster file says of token and certificates: values, and where the files of one node are. Pure."""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path

from cluster.config_read import Table

SECURITY_KEYS = ("token_file", "tls", "allow_plaintext")
TLS_KEYS = ("ca", "cert", "key")
PLACES = ("name", "rank")  # what a path may contain in braces, so that one file serves all nodes
_DOMAIN = "macrame.internal"  # .internal is reserved for private use: nobody else can own such a name
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(?=.{{1,200}}$){_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """The paths as the file gives them; TLS has all three or none."""

    token_file: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    allow_plaintext: bool = False  # the owner's word that a token without encryption is enough

    @property
    def has_tls(self) -> bool:
        return self.tls_ca is not None


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The three PEM files of one node, and the node's name, for which its certificate must be."""

    name: str
    ca: Path
    cert: Path
    key: Path


def identity(name: str) -> str:
    """The DNS name under which a node of this name proves itself, whatever address it is reached at.

    A node has several addresses, and those of a Thunderbolt link change; its name in the config stays.
    """
    plain = name if _DNS_NAME.fullmatch(name) else f"node-{_short_digest(name)}"
    return f"{plain}.{_DOMAIN}"


def file_stem(name: str) -> str:
    """A node's name as part of a path: itself where it is plain, else made plain and told apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:80]
    return plain if plain == name else f"{plain}-{_short_digest(name)}"


def tls_files(security: SecurityConfig, base: Path, rank: int, name: str) -> TlsFiles | None:
    """The node's files, relative paths from `base`; None where the config has no TLS."""
    if not security.has_tls:
        return None
    assert security.tls_ca is not None
    assert security.tls_cert is not None
    assert security.tls_key is not None
    ca, cert, key = (
        base / Path(path.format(name=file_stem(name), rank=rank)).expanduser()
        for path in (security.tls_ca, security.tls_cert, security.tls_key)
    )
    return TlsFiles(name, ca, cert, key)


def read_security(table: Table) -> SecurityConfig:
    """Checks the section. Raises ConfigError."""
    tls = table.take_table("tls", TLS_KEYS)
    given = {key: tls.take_str(key) for key in TLS_KEYS}
    if any(given.values()):
        for key, path in given.items():
            if path is None:
                raise tls.error(key, "belongs to the others: TLS takes ca, cert and key")
            _check_places(tls, key, path)
    return SecurityConfig(
        table.take_str("token_file"),
        given["ca"],
        given["cert"],
        given["key"],
        table.take_bool("allow_plaintext", False),
    )


def _check_places(table: Table, key: str, path: str) -> None:
    rule = "may contain {name} and {rank} in braces, nothing else" if key != "ca" else "is the same for all"
    try:
        fields = list(string.Formatter().parse(path))
    except ValueError:
        raise table.error(key, rule) from None
    allowed = PLACES if key != "ca" else ()
    for _text, place, spec, conversion in fields:
        if place is not None and (place not in allowed or spec or conversion):
            raise table.error(key, rule)


def _short_digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]
