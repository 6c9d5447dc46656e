"""The files that each node of a config gets: its own copy of the config, the token, keys and certificates.

What is given out is made once from the user's files; nothing here reaches another machine. One thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.config_forms import own_form, refuse_missing_model
from cluster.config_read import read_document
from cluster.config_security import TlsFiles, file_stem
from deploy.authority import authorities_folder
from deploy.certificates import USUAL, CertificateFolder, Standing, folder_of, make
from deploy.config_tls import with_tls
from deploy.node_handle import CERTIFICATES, CONFIG_NAME
from shard_loader.folder import find_folder
from shard_loader.whole_file import write_whole

TOKEN_NAME, KEYS_NAME = "token", "api_keys"
_PRIVATE, _OPEN = 0o600, 0o644


@dataclass(frozen=True, slots=True)
class Hand:
    """What is given to the nodes of one config."""

    config: ClusterConfig
    document: bytes  # every node's cluster.json
    secrets: dict[str, bytes]  # of every node
    certificates: CertificateFolder | None
    folders: tuple[Path, ...]  # of the model and adapters, where the config names folders: needed everywhere

    @property
    def as_handed(self) -> ClusterConfig:
        """The user's config with the certificates that its nodes get, whether it names them or not."""
        if self.certificates is None:
            return self.config
        return replace(self.config, security=self.certificates.security)

    def files(self, rank: int) -> dict[str, tuple[bytes, int]]:
        """Relative name -> (content, mode) for one node. Raises ConfigError for what cannot be read."""
        files = {CONFIG_NAME: (self.document, _PRIVATE)}
        files |= {name: (content, _PRIVATE) for name, content in self.secrets.items()}
        if self.certificates is not None:
            files |= _certificates(self.certificates.files(self.config.nodes[rank]))
        return files


def needs_certificates(config: ClusterConfig) -> bool:
    """Whether nodes talk beyond this machine, and the user did not choose to let them do so in the open."""
    return config.security.has_tls or not (config.is_loopback or config.security.allow_plaintext)


def make_certificates(config: ClusterConfig, now: datetime) -> list[Standing]:
    """Those that this config's nodes lack, or that end soon, and why each was made. Raises ConfigError.

    Certificates of a CA whose key is not here are taken as they are, while all of them can be used.
    """
    folder = folder_of(config)
    standings = folder.standings(now)
    if folder.ca_file.exists() and not any(s.need for s in standings):
        return []
    try:
        return [s for s in make(folder, authorities_folder(), now) if s.need]
    except ConfigError as error:
        if all(s.expires_at is not None and s.expires_at > now for s in standings) and standings:
            return []
        why = "; ".join(f"the certificate of {s.node.name}: {s.need}" for s in standings if s.need)
        raise ConfigError(f"{why}; and {error}" if why else str(error)) from None


def write_tls(config: ClusterConfig) -> bool:
    """Puts security.tls into the user's file; False where a person must: see with_tls, or it is read-only."""
    target = config.path.resolve()
    tls = {"ca": USUAL.tls_ca or "", "cert": USUAL.tls_cert or "", "key": USUAL.tls_key or ""}
    try:
        raw = target.read_bytes()
        has_mark = raw.startswith(b"\xef\xbb\xbf")
        text = with_tls(config.path, raw.decode("utf-8-sig"), tls)
        mode = target.stat().st_mode & 0o777
        if text is None or not mode & 0o222:
            return False
        write_whole(target, text.encode("utf-8-sig" if has_mark else "utf-8"), mode)
        target.chmod(mode)  # whatever the umask took
    except (OSError, UnicodeDecodeError):
        return False
    return True


def hand_out(path: Path, model: str | None) -> Hand:
    """Reads the config and all that it names. Raises ConfigError."""
    config = load_config(path, model=model)
    document: dict[str, Any] = dict(own_form(path, read_document(path)))
    named = model or document.get("model")
    if named is None:
        raise refuse_missing_model(path)
    try:
        folder = find_folder(config.model, config.model_dir_base)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    document["model"] = config.model if folder is None else str(folder)
    folders = [] if folder is None else [folder]
    if (drafter := config.speculation.draft_model) is not None:
        place = config.model_dir_base / Path(drafter).expanduser()
        if place.is_dir():  # rank 0 alone reads it, and says so where it is not there
            document["speculation"] = {**document["speculation"], "draft_model": str(place.resolve())}
    load = dict(document.get("load") or {})
    if load.get("adapters"):
        places = [adapter.path.resolve() for adapter in config.adapters]
        load["adapters"] = [
            {**adapter, "path": str(place)} for adapter, place in zip(load["adapters"], places, strict=True)
        ]
        document["load"] = load
        folders += places
    secrets: dict[str, bytes] = {}
    security: dict[str, Any] = {}
    token, keys = config.token(), config.api_keys()
    if token is not None:
        security["token_file"], secrets[TOKEN_NAME] = TOKEN_NAME, f"{token}\n".encode()
    api = {**(document.get("api") or {}), "keys_file": KEYS_NAME if keys else None}
    if keys:
        secrets[KEYS_NAME] = "".join(f"{key}\n" for key in keys).encode()
    if config.security.allow_plaintext:
        security["allow_plaintext"] = True
    has_tls = needs_certificates(config)
    if has_tls:
        security["tls"] = {
            "ca": f"{CERTIFICATES}ca.pem",
            "cert": f"{CERTIFICATES}{{name}}.pem",
            "key": f"{CERTIFICATES}{{name}}.key",
        }
    document |= {"api": api, "security": security}
    content = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
    return Hand(config, content, secrets, folder_of(config) if has_tls else None, tuple(folders))


def _certificates(tls: TlsFiles) -> dict[str, tuple[bytes, int]]:
    stem = file_stem(tls.name)
    wanted = {"ca.pem": (tls.ca, _OPEN), f"{stem}.pem": (tls.cert, _OPEN), f"{stem}.key": (tls.key, _PRIVATE)}
    try:
        return {f"{CERTIFICATES}{name}": (path.read_bytes(), mode) for name, (path, mode) in wanted.items()}
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
