"""Tokens, API keys and certificates as the config names them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.config import ConfigError
from cluster.config_security import TlsFiles, identity
from tests.test_config import load, nodes


def secret(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "secret"
    path.write_text(text)
    path.chmod(mode)
    return "secret"


def test_the_token_is_in_a_file_beside_the_config_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path).token() is None
    monkeypatch.setenv("MACRAME_TOKEN", "from-env")
    assert load(tmp_path).token() == "from-env"
    assert load(tmp_path, security={"token_file": secret(tmp_path, " s3cret\n")}).token() == "s3cret"


def test_a_token_file_that_others_can_read_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(tmp_path, security={"token_file": secret(tmp_path, "s", 0o600)}).token() == "s"
    assert not caplog.records
    assert load(tmp_path, security={"token_file": secret(tmp_path, "s", 0o644)}).token() == "s"
    assert "can be read by other users of this machine: run chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", r"secret \(security\.token_file\) is empty"),
        ("a b", "must be one line"),
        ("é", "printable ASCII"),
    ],
)
def test_a_token_that_cannot_be_one(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, security={"token_file": secret(tmp_path, text)}).token()


def test_an_empty_token_in_the_environment_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACRAME_TOKEN", "")
    with pytest.raises(ConfigError, match="MACRAME_TOKEN is empty"):
        load(tmp_path).token()


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='token_file = "no" cannot be read: No such file'):
        load(tmp_path, security={"token_file": "no"}).token()


def test_api_keys_are_lines_or_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path).api_keys() == ()
    monkeypatch.setenv("MACRAME_API_KEYS", "a, b,")
    assert load(tmp_path).api_keys() == ("a", "b")
    config = load(tmp_path, api={"keys_file": secret(tmp_path, "# mine\nk1\n\n k2 \n")})
    assert config.api_keys() == ("k1", "k2")
    with pytest.raises(ConfigError, match=r"secret \(api\.keys_file\) holds no key"):
        load(tmp_path, api={"keys_file": secret(tmp_path, "# none\n")}).api_keys()


def test_certificate_paths_are_those_of_each_node(tmp_path: Path) -> None:
    tls = {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "/secret/{rank}.key"}
    two = nodes({"name": "a"}, {"name": "b/../c"})
    assert load(tmp_path, **two).tls_files(0) is None
    config = load(tmp_path, security={"tls": tls}, **two)
    assert config.tls_files(0) == TlsFiles(
        "a", tmp_path / "certs/ca.pem", tmp_path / "certs/a.pem", Path("/secret/0.key")
    )
    other = config.tls_files(1)
    assert other is not None
    assert other.cert.parent == tmp_path / "certs"  # a name never leads out of the folder
    assert re.fullmatch(r"b-\.\.-c-[0-9a-f]{12}\.pem", other.cert.name)


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("mini1", "mini1.macrame.internal"),
        ("mini1.local", "mini1.local.macrame.internal"),
        ("10.0.0.2", "10.0.0.2.macrame.internal"),
        ("Mini1", r"node-[0-9a-f]{12}.macrame.internal"),  # DNS has no capitals: mini1 is somebody else
        ("Anna's Mac", r"node-[0-9a-f]{12}.macrame.internal"),
        ("a..b", r"node-[0-9a-f]{12}.macrame.internal"),
        ("x" * 300, r"node-[0-9a-f]{12}.macrame.internal"),
    ],
)
def test_every_name_has_an_identity_that_tls_can_check(name: str, known_as: str) -> None:
    assert re.fullmatch(known_as, identity(name))


def test_nothing_listens_beyond_loopback_without_a_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(tmp_path).check_credentials()
    wide = load(tmp_path, **nodes({}))
    assert not wide.is_loopback
    with pytest.raises(
        ConfigError, match=r'"h0" is reachable .* set security\.tls \(.*\), or security\.token_file or MAC'
    ):
        wide.check_credentials()
    load(tmp_path, security={"tls": {"ca": "a", "cert": "b", "key": "c"}}, **nodes({})).check_credentials()
    assert not caplog.records
    monkeypatch.setenv("MACRAME_TOKEN", "t")
    wide.check_credentials()
    assert len(caplog.messages) == 1
    assert "is not encrypted, and the token can be read on the way: 'macrame certs make'" in caplog.text
    caplog.clear()
    load(tmp_path, security={"allow_plaintext": True}, **nodes({})).check_credentials()
    assert not caplog.records
    api = load(tmp_path, api={"host": "0.0.0.0"})
    with pytest.raises(
        ConfigError, match=r'api\.host = "0\.0\.0\.0" is reachable .* set api\.keys_file or MAC'
    ):
        api.check_credentials()
    monkeypatch.setenv("MACRAME_API_KEYS", "k")
    api.check_credentials()
