"""Making a cluster's certificates: what is made, what is left alone, what is refused."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.certificate import (
    addresses,
    dns_names,
    fingerprint,
    is_signed_by,
    parse_certificates,
    read_identity,
)
from cluster.config import ConfigError, load_config
from deploy.authority import Authority, authorities_folder, key_file, write_atomically
from deploy.certificates import CertificateFolder, Standing, folder_of, make
from tests.certificates import DAY, NOW

TLS = {"ca": "pki/ca.pem", "cert": "pki/{name}.pem", "key": "pki/{rank}.key"}


def folder(tmp_path: Path, *hosts: str, **config: Any) -> CertificateFolder:
    nodes = [
        {"name": f"mini{rank + 1}", "host": host}
        for rank, host in enumerate(hosts or ("10.0.0.1", "b.local"))
    ]
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"model": "m", "nodes": nodes, **config}))
    return folder_of(load_config(path))


def made(tmp_path: Path, where: CertificateFolder, now: datetime = NOW, **options: Any) -> list[Standing]:
    return make(where, tmp_path / "keys", now, **options)


def snapshot(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_first_run_makes_a_ca_and_a_pair_for_each_node(tmp_path: Path) -> None:
    where = folder(tmp_path)
    standings = made(tmp_path, where)
    assert [s.need for s in standings] == ["missing", "missing"]
    first, second = (read_identity(where.files(s.node)) for s in standings)
    assert (dns_names(first.cert), addresses(first.cert)) == (["mini1.macrame.internal"], ["10.0.0.1"])
    assert (dns_names(second.cert), addresses(second.cert)) == (["mini2.macrame.internal", "b.local"], [])
    assert first.cert.serial_number != second.cert.serial_number
    assert first.expires_at == (NOW + 365 * DAY).replace(microsecond=0)
    assert first.cert.not_valid_before_utc == (NOW - timedelta(hours=1)).replace(microsecond=0)
    (ca,) = parse_certificates(where.ca_file, where.ca_file.read_bytes())
    assert is_signed_by(ca, ca)
    assert (ca.not_valid_after_utc - ca.not_valid_before_utc) > timedelta(days=3652)
    assert {p.relative_to(tmp_path).as_posix() for p in snapshot(tmp_path)} == {
        *("cluster.json", "certs/ca.pem", f"keys/{fingerprint(ca)}/ca.key"),
        *("certs/mini1.pem", "certs/mini1.key", "certs/mini2.pem", "certs/mini2.key"),
    }


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        made(tmp_path, folder(tmp_path))
    finally:
        os.umask(previous)
    for path in snapshot(tmp_path):
        if path.suffix == ".key":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            assert b"PRIVATE KEY" in path.read_bytes()
        else:
            assert b"PRIVATE KEY" not in path.read_bytes()
    assert stat.S_IMODE(next((tmp_path / "keys").iterdir()).stat().st_mode) == 0o700


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    where = folder(tmp_path, security={"tls": TLS})
    made(tmp_path, where)
    before = snapshot(tmp_path)
    assert (tmp_path / "pki" / "0.key") in before
    assert [s.need for s in made(tmp_path, where, NOW + 304 * DAY)] == ["", ""]
    assert snapshot(tmp_path) == before


def test_one_that_nears_its_end_is_renewed_with_a_new_key(tmp_path: Path) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    made(tmp_path, where, NOW + 100 * DAY, again=["mini2"])
    before, later = snapshot(tmp_path), NOW + 306 * DAY
    standings = made(tmp_path, where, later)
    assert [s.need for s in standings] == ["near its end", ""]
    assert standings[0].expires_at == (later + 365 * DAY).replace(microsecond=0)
    changed = {path.name for path, content in snapshot(tmp_path).items() if before[path] != content}
    assert changed == {"mini1.pem", "mini1.key"}
    read_identity(standings[0].files).check_time(later)
    assert [s.need for s in made(tmp_path, where, NOW + 5 * 365 * DAY)] == ["expired", "expired"]


def test_a_node_that_was_added_gets_its_own(tmp_path: Path) -> None:
    made(tmp_path, folder(tmp_path, "10.0.0.1"))
    before = snapshot(tmp_path / "certs")
    assert [s.need for s in made(tmp_path, folder(tmp_path, "10.0.0.1", "10.0.0.2"))] == ["", "missing"]
    after = snapshot(tmp_path / "certs")
    assert {path: after[path] for path in before} == before


def test_what_makes_a_certificate_be_made_again(tmp_path: Path) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    mini1, mini2 = (where.files(node) for node in where.config.nodes)
    mini1.key.chmod(0o640)
    mini2.key.unlink()
    assert [s.need for s in made(tmp_path, where)] == ["others could read its key", "its key is missing"]
    mini1.key.write_bytes(mini2.key.read_bytes())
    assert [s.need for s in made(tmp_path, where)] == ["certificate and key do not fit", ""]
    moved = folder(tmp_path, "10.0.0.9", "b.local")
    assert [s.need for s in made(tmp_path, moved)] == ["the node has another host now", ""]
    assert [s.need for s in made(tmp_path, moved)] == ["", ""]


def test_a_certificate_never_outlives_its_ca(tmp_path: Path) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    (ca,) = parse_certificates(where.ca_file, where.ca_file.read_bytes())
    later = ca.not_valid_after_utc - 90 * DAY
    assert {s.expires_at for s in made(tmp_path, where, later)} == {ca.not_valid_after_utc}
    with pytest.raises(ConfigError, match=r"expired on .*: move it and the certificates beside it away"):
        made(tmp_path, where, ca.not_valid_after_utc + DAY)


# -- refusals ---------------------------------------------------------------------------------------------
def test_certificates_of_another_cluster_are_not_overwritten(tmp_path: Path) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    made(tmp_path, folder(elsewhere))
    where.ca_file.write_bytes((elsewhere / "certs" / "ca.pem").read_bytes())
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, where, again=["mini1"])
    assert str(caught.value) == (
        f"{tmp_path}/certs/mini1.pem is of another cluster's CA than {where.ca_file}: keep each cluster's "
        "certificates in a folder of its own (security.tls), or move the wrong ones away"
    )
    where.ca_file.unlink()
    with pytest.raises(
        ConfigError, match=r"mini1\.pem is there, but its CA .* is not: copy the CA back, or move"
    ):
        made(tmp_path, where)
    assert snapshot(tmp_path) == {path: content for path, content in before.items() if path != where.ca_file}


def test_without_the_ca_key_nothing_is_made_and_nothing_needs_to_be(tmp_path: Path) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    another_machine = tmp_path / "no-keys"
    assert [s.need for s in make(where, another_machine, NOW)] == ["", ""]
    with pytest.raises(ConfigError) as caught:
        make(where, another_machine, NOW, again=["mini1"])
    assert "is not on this machine: run this where that CA was made, which keeps it in " in str(caught.value)
    assert not another_machine.exists()


def test_a_ca_key_that_others_can_read_or_of_another_ca(tmp_path: Path) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    (ca,) = parse_certificates(where.ca_file, where.ca_file.read_bytes())
    key = key_file(tmp_path / "keys", ca)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"ca\.key \(the key of the CA\) can be read by other users"):
        made(tmp_path, where, again=["mini1"])
    key.write_bytes(where.files(where.config.nodes[0]).key.read_bytes())
    key.chmod(0o600)
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of .*: put the right one back"):
        made(tmp_path, where, again=["mini1"])


def test_nodes_may_not_share_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        folder(tmp_path, security={"tls": {**TLS, "key": "one.key"}})
    assert str(caught.value) == (
        f"{tmp_path}/cluster.json: security.tls.key is {tmp_path}/one.key for 'mini1' and for 'mini2': put "
        "{name} into it, so that each node has its own"
    )


# -- writing ----------------------------------------------------------------------------------------------
def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pem"
    write_atomically(path, b"before")

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfigError, match=r"a\.pem cannot be written: No space left on device"):
        write_atomically(path, b"after")
    assert snapshot(tmp_path) == {path: b"before"}


def test_a_run_cut_short_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder(tmp_path)
    made(tmp_path, where)
    issue = Authority.issue

    def issue_half(self: Authority, *args: Any) -> Any:
        pair = issue(self, *args)
        write_atomically(where.files(where.config.nodes[0]).key, pair.key, is_private=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(Authority, "issue", issue_half)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, where, again=["mini1"])
    monkeypatch.undo()
    assert [s.need for s in made(tmp_path, where)] == ["certificate and key do not fit", ""]


def test_a_host_that_dns_cannot_carry_has_its_name_alone(tmp_path: Path) -> None:
    where = folder(tmp_path, "mini_1..local", "Müller.local")
    standings = made(tmp_path, where)
    names = [dns_names(read_identity(s.files).cert) for s in standings]
    assert names == [["mini1.macrame.internal"], ["mini2.macrame.internal", "xn--mller-kva.local"]]
    assert [s.need for s in made(tmp_path, where)] == ["", ""]


def test_ca_keys_are_kept_away_from_what_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert authorities_folder() == tmp_path / "macrame" / "authorities"
    monkeypatch.delenv("XDG_DATA_HOME")
    for platform, place in (("linux", ".local/share"), ("darwin", "Library/Application Support")):
        monkeypatch.setattr("sys.platform", platform)
        assert authorities_folder() == Path.home() / place / "macrame" / "authorities"


def test_a_very_long_name(tmp_path: Path) -> None:
    where = folder(tmp_path)
    long = replace(where.config.nodes[0], name="n" * 300)
    where = replace(where, config=replace(where.config, nodes=(long,)))
    (standing,) = made(tmp_path, where)
    read_identity(standing.files)
