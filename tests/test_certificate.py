"""A node's three files: which are used, and the sentence for each that is not."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.certificate import addresses, dns_names, read_identity
from cluster.config import ConfigError
from cluster.config_security import TlsFiles
from cluster.errors import EXIT_USAGE
from tests.certificates import DAY, EARLY, NOW, Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "certs")


def refused(files: TlsFiles) -> str:
    with pytest.raises(ConfigError) as caught:
        read_identity(files).check_time(NOW)
    assert caught.value.exit_code == EXIT_USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_right_certificate_is_taken(cluster: Cluster) -> None:
    held = read_identity(cluster.node("mini1"))
    held.check_time(NOW)
    assert dns_names(held.cert) == ["mini1.macrame.internal"]
    assert addresses(held.cert) == ["127.0.0.1"]
    assert held.expires_at == (NOW + 365 * DAY).replace(microsecond=0)
    assert held.warning(NOW) == ""


def test_openssl_finds_nothing_wrong_with_it(cluster: Cluster) -> None:
    """Strictly by RFC 5280, by another implementation than the one that made it."""
    files = cluster.node("mini1")
    for purpose in ("sslserver", "sslclient"):
        result = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", files.ca, files.cert],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout.strip() == f"{files.cert}: OK", result.stderr


def test_a_certificate_out_of_its_time(cluster: Cluster) -> None:
    text = refused(cluster.expired("mini1"))
    assert f"mini1.pem expired on {NOW - 10 * DAY:%Y-%m-%d}: make new ones with 'macrame certs make'" in text
    text = refused(cluster.not_yet_valid("mini1"))
    assert f"is good from {EARLY:%Y-%m-%d} on, and the clock here says {NOW:%Y-%m-%d}: set" in text


def test_clocks_may_differ_by_most_of_an_hour(cluster: Cluster) -> None:
    read_identity(cluster.node("mini1")).check_time(NOW - timedelta(minutes=59))


def test_it_warns_for_thirty_days(cluster: Cluster) -> None:
    held = read_identity(cluster.node("mini1", life=100 * DAY))
    assert held.warning(NOW + 69 * DAY) == ""
    assert f"expires on {NOW + 100 * DAY:%Y-%m-%d}, in 28 days: make new ones" in held.warning(NOW + 71 * DAY)
    assert "in 0 days" in held.warning(NOW + 101 * DAY)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_can_read(cluster: Cluster, mode: int) -> None:
    files = cluster.node("mini1")
    files.key.chmod(mode)
    text = refused(files)
    assert text.startswith(
        f"{files.key} (security.tls.key) can be read by other users of this machine: run chm"
    )


def test_a_certificate_of_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster(tmp_path / "other")
    text = refused(cluster.node("mini1", signer=other.authority))
    assert f"mini1.pem is not of the CA in {cluster.ca_file} (macrame cluster CA " in text
    assert "copy certificate, key and CA of the same cluster" in text


def test_a_certificate_of_another_node(cluster: Cluster) -> None:
    text = refused(cluster.node("mini1", of="mini2"))
    assert "is not for the node 'mini1' but for mini2.macrame.internal: each node takes its own" in text


def test_a_key_of_another_certificate(cluster: Cluster) -> None:
    files, other = cluster.node("mini1"), cluster.node("mini2")
    files.key.write_bytes(other.key.read_bytes())
    assert "mini1.key is not the key of" in refused(files)


@pytest.mark.parametrize("kind", ["ca", "cert", "key"])
def test_a_file_that_is_not_there(cluster: Cluster, kind: str) -> None:
    files = cluster.node("mini1")
    path: Path = getattr(files, kind)
    path.unlink()
    text = refused(files)
    assert text == (
        f"{path} (security.tls.{kind}) cannot be read: No such file or directory; 'macrame certs make' makes "
        "it, on one machine for all"
    )


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("ca", "holds no certificate in PEM form"),
        ("cert", "holds no certificate in PEM form"),
        ("key", "holds no private key in PEM form without a password"),
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_holds_something_else(cluster: Cluster, kind: str, sentence: str, content: bytes) -> None:
    files = cluster.node("mini1")
    getattr(files, kind).write_bytes(content)
    assert sentence in refused(files)


def test_a_ca_file_may_hold_two(cluster: Cluster, tmp_path: Path) -> None:
    """While a cluster moves from one CA to the next."""
    other = Cluster(tmp_path / "other")
    files = cluster.node("mini1")
    files.ca.write_bytes(other.ca_file.read_bytes() + files.ca.read_bytes())
    assert read_identity(files).cert.issuer == cluster.authority.cert.subject
