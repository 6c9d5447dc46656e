"""`macrame certs`: what it prints and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.certs import main
from tests.certificates import DAY, NOW, Cluster


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "cluster.json"
    nodes = [{"name": "mini1", "host": "127.0.0.1"}, {"name": "mini2", "host": "mini2.local"}]
    path.write_text(json.dumps({"nodes": nodes}))  # certificates need no model
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out or captured.err


def test_make_says_what_was_made_and_where_it_belongs(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, "make", "--config", config)
    assert code == 0
    certs = config.parent / "certs"
    assert re.match(
        rf"Made macrame cluster CA [0-9a-f]{{8}}\. Its key stays here, copy it nowhere but to a backup: "
        rf"{config.parent}/data/macrame/authorities/[0-9a-f]{{16}}/ca\.key\n"
        r"Made the certificate of mini1: missing\.\nMade the certificate of mini2: missing\.\n",
        text,
    )
    copied = f"{certs}/ca.pem {certs}/mini2.pem {certs}/mini2.key"
    assert f"    scp -p {copied} mini2.local:{certs}/\n" in text
    assert "127.0.0.1:" not in text  # its files are where they belong
    assert text.endswith(
        f'Then put this into "security" in {config}, everywhere:\n'
        '    "tls": {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "certs/{name}.key"}\n'
    )
    code, text = run(capsys, "make", "--config", config)
    assert code == 0
    assert "All of them are right; nothing was changed." in text
    assert "Made" not in text


def test_what_make_prints_for_the_config_is_understood(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = run(capsys, "make", "--config", config)
    line = next(line for line in text.splitlines() if line.startswith('    "tls"'))
    config.write_text(json.dumps({**json.loads(config.read_text()), "security": json.loads(f"{{{line}}}")}))
    code, text = run(capsys, "make", "--config", config)
    assert (code, "security" in text) == (0, False)
    assert "nothing was changed" in text


def test_show_finds_what_is_missing(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = run(capsys, "show", "--config", config)
    assert code == 1
    assert "missing" in text
    assert text.endswith("Make new ones with 'macrame certs make' and copy them to their nodes.\n")
    assert not (config.parent / "certs").exists()
    run(capsys, "make", "--config", config)
    code, text = run(capsys, "show", "--config", config)
    assert code == 0
    assert f"{NOW + 365 * DAY:%Y-%m-%d}" in text
    assert re.match(
        rf"macrame cluster CA .*, good until {NOW.year + 10}-.* Its key is in .*/ca\.key\.\n", text
    )
    monkeypatch.setenv("XDG_DATA_HOME", str(config.parent / "elsewhere"))
    code, text = run(capsys, "show", "--config", config)
    assert (code, text.splitlines()[0].endswith("Its key is not on this machine.")) == (0, True)


def test_show_as_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "show", "--config", config, "--json")
    assert (code, json.loads(text)["ca"]) == (1, None)
    code, text = run(capsys, "make", "--config", config, "--json", "--days", 90)
    assert [node["need"] for node in json.loads(text)["nodes"]] == ["missing", "missing"]
    code, text = run(capsys, "show", "--config", config, "--json")
    told = json.loads(text)
    assert code == 0
    assert set(told["ca"]) == {"file", "name", "fingerprint", "expires_at", "key"}
    assert [(n["rank"], n["name"], n["days_left"], n["need"]) for n in told["nodes"]] == [
        (0, "mini1", 89, ""),
        (1, "mini2", 89, ""),
    ]


def test_renew_takes_names_or_all(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "make", "--config", config)
    _, text = run(capsys, "renew", "mini2", "--config", config)
    assert "Made the certificate of mini2: asked for." in text
    assert "of mini1" not in text
    _, text = run(capsys, "renew", "--config", config)
    assert text.count("asked for") == 2
    assert "A running node takes them by itself" in text


def test_a_new_ca_replaces_everything(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "make", "--config", config)
    ca, cert = config.parent / "certs" / "ca.pem", config.parent / "certs" / "mini2.pem"
    before = ca.read_bytes(), cert.read_bytes()
    code, text = run(capsys, "renew-ca", "--config", config)
    assert code == 0
    assert text.startswith("Made macrame cluster CA ")
    assert text.count("of the new CA.") == 2
    assert "Connections that stand are not closed by this" in text
    assert ca.read_bytes() != before[0]
    cert.write_bytes(before[1])  # as if it had been cut short: it is to be run again
    assert run(capsys, "make", "--config", config)[0] == 3
    assert run(capsys, "renew-ca", "--config", config)[0] == 0
    assert run(capsys, "show", "--config", config)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("renew", "mini3"), "has no node 'mini3': its nodes are mini1, mini2"),
        (("make", "mini1"), "make is for all nodes; renew takes names"),
        (("make", "--days", 0), "--days 0 must be from 1 to 3650"),
    ],
)
def test_what_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    try:
        code, text = run(capsys, *arguments, "--config", config)
    except SystemExit as ended:
        code, text = int(str(ended.code)), capsys.readouterr().err
    assert code == 3
    assert message in text


def test_another_clusters_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certs = config.parent / "certs"
    run(capsys, "make", "--config", config)
    certs.joinpath("ca.pem").write_bytes(Cluster(config.parent / "other").ca_file.read_bytes())
    code, text = run(capsys, "make", "--config", config)
    assert code == 3
    assert text.startswith(f"macrame certs: {certs}/mini1.pem is of another cluster's CA than {certs}/ca.pem")
