"""What `macrame up` says of certificates that it can neither take nor make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.config import ConfigError, load_config
from deploy.up_files import make_certificates
from tests.certificates import DAY, NOW, Cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    nodes = [{"name": name, "host": f"{name}.local"} for name in ("mini1", "mini2")]
    (tmp_path / "cluster.json").write_text(json.dumps({"model": "org/m", "nodes": nodes}))
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        make_certificates(load_config(folder / "cluster.json"), NOW)
    return str(raised.value)


def foreign(folder: Path, name: str = "foreign", *, age_days: int = 0) -> Path:
    """certs/ of a CA whose key is elsewhere."""
    cluster = Cluster(folder / name)
    for node in ("mini1", "mini2"):
        cluster.node(node, begin=NOW - age_days * DAY)
    certs = folder / "certs"
    certs.mkdir(exist_ok=True)
    for path in cluster.folder.glob("*.*"):
        shutil.copy2(path, certs)
    return certs


def test_certificates_of_a_ca_from_elsewhere_are_taken_while_they_are_valid(folder: Path) -> None:
    foreign(folder)
    assert make_certificates(load_config(folder / "cluster.json"), NOW) == []


def test_expired_ones_of_a_ca_from_elsewhere_are_told(folder: Path) -> None:
    foreign(folder, age_days=400)
    told = refused(folder)
    assert told.startswith("the certificate of mini1: expired; the certificate of mini2: expired")
    assert "; and the key of macrame cluster CA " in told
    assert "is not on this machine: run this where that CA was made" in told


def test_one_of_another_cluster_is_told(folder: Path) -> None:
    certs = foreign(folder)
    other = Cluster(folder / "other")
    shutil.copy2(other.node("mini2").cert, certs)
    assert refused(folder) == (
        f"{certs / 'mini2.pem'} is of another cluster's CA than {certs / 'ca.pem'}: keep each cluster's "
        "certificates in a folder of its own (security.tls), or move the wrong ones away"
    )


def test_what_is_no_certificate_and_what_is_no_file_is_told(folder: Path) -> None:
    certs = foreign(folder)
    (certs / "mini2.pem").write_text("nonsense")
    assert refused(folder).startswith(f"{certs / 'mini2.pem'} holds no certificate in PEM form (")
    (certs / "mini2.pem").unlink()
    (certs / "mini2.pem").mkdir()
    assert refused(folder) == f"{certs / 'mini2.pem'} cannot be read: Is a directory"
