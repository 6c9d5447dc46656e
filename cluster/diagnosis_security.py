"""Doctor's check of token, certificates and API keys on this machine. Any thread; reads their files."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cluster.config import ClusterConfig, ConfigError, is_loopback
from cluster.console import as_word
from cluster.diagnosis import Finding, Subject, fine, skipped

_ADVICE = re.compile(r"; |: (?=make new|set this|copy |run chmod|each node)")  # begins in those sentences
MAKE_TOKEN = "umask 077 && openssl rand -hex 32 > {}    # the same file on every node"


def security(subject: Subject) -> Iterable[Finding]:
    """Files that others can read, certificates out of their time, and what lacks a credential."""
    config = subject.config
    if config is None:
        yield skipped("security", subject.why_no_nodes)
        return
    found = [*_secrets(config), *_needed(config), *_certificates(subject, config)]
    yield from found
    if not any(finding.is_wrong for finding in found) and not config.security.has_tls:
        is_open = any(not is_loopback(node.host) for node in config.nodes)
        chosen = "a token is set, and the file says that it may go unencrypted"
        yield fine("security", chosen if is_open else "nothing listens beyond this machine")


def _secrets(config: ClusterConfig) -> Iterable[Finding]:
    """Files with a secret that other users may read."""
    files = (
        ("security.token_file", config.security.token_file, "join the cluster, and end its requests"),
        ("api.keys_file", config.api.keys_file, "use the API with your keys"),
    )
    for key, name, what_for in files:
        if name is None:
            continue
        path = config.model_dir_base / Path(name).expanduser()
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            continue  # what needs the file says so
        if mode & 0o077:
            yield Finding(
                "security",
                "error",
                f"{path} ({key}) can be read by other users of this machine (mode {mode:o})",
                f"whoever has an account here can {what_for}",
                f"chmod 600 {as_word(path)}",
            )


def _needed(config: ClusterConfig) -> Iterable[Finding]:
    """What the nodes refuse to start without."""
    try:
        config.check_credentials()
        config.token()
        config.api_keys()
    except ConfigError as error:
        is_token = "token" in str(error)
        place = config.security.token_file or "cluster.token"
        make = MAKE_TOKEN.format(config.model_dir_base / place)
        if config.security.token_file is None:
            make += f', and "token_file": "{place}" in "security" of {config.path}'
        yield Finding(
            "security",
            "error",
            str(error).removeprefix(f"{config.path}: ").partition(": set ")[0],
            "a node that listens beyond this machine without one would serve anybody, so run_node refuses",
            make
            if is_token
            else f"openssl rand -hex 32    # a line of the file of api.keys_file in {config.path}",
        )
        return
    is_open = any(not is_loopback(node.host) for node in config.nodes)
    if is_open and not config.security.has_tls and not config.security.allow_plaintext:
        yield Finding(
            "security",
            "warning",
            "what the nodes send each other is not encrypted",
            "who listens in the network can read prompts, answers and the token, and join with it",
            f"macrame certs make --config {as_word(config.path)}    # or, where you trust the network: "
            '"allow_plaintext": true in "security"',
        )


def _certificates(subject: Subject, config: ClusterConfig) -> Iterable[Finding]:
    """Of the nodes on this machine."""
    if not config.security.has_tls:
        return
    if not subject.ranks:
        yield skipped("certificates", subject.why_no_nodes)
        return
    from cluster.certificate import day, read_identity

    now = datetime.now(UTC)
    for node in subject.nodes:
        files = config.tls_files(node.rank)
        assert files is not None
        try:
            held = read_identity(files)
            held.check_time(now)
        except ConfigError as error:
            yield Finding(
                "certificates",
                "error",
                _ADVICE.split(str(error))[0],
                f"{node.name} does not start with it, and the others refuse its connections",
                _mend(str(error), config),
            )
            continue
        if text := held.warning(now):
            why = f"from then on the others refuse {node.name}"
            yield Finding("certificates", "warning", text.partition(": ")[0], why, _make(config))
        else:
            yield fine("certificates", f"that of {node.name} is good until {day(held.expires_at)}")


def _mend(sentence: str, config: ClusterConfig) -> str:
    """The command for one of the sentences of cluster/certificate.py."""
    if "chmod 600 " in sentence:
        return "chmod 600 " + sentence.partition("chmod 600 ")[2].partition(", and make a ")[0]
    if "set this machine's clock" in sentence:
        return "sudo timedatectl set-ntp true    # on a Mac: sudo sntp -sS time.apple.com"
    return _make(config)


def _make(config: ClusterConfig) -> str:
    return (
        f"macrame certs make --config {as_word(config.path)}    # where the cluster's CA is; then copy the "
        "new files to their nodes as it says"
    )
