"""Checks of `macrame doctor` of secrets, certificates and model files, with faults planted in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.diagnosis_model import model
from cluster.diagnosis_plan import plan
from cluster.diagnosis_security import security
from tests.certificates import DAY, NOW, Cluster
from tests.node_process import node, write_cluster
from tests.test_diagnosis import LAN, only, subject, wrong
from tests.tiny_models import write_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny", num_layers=5)


def test_secrets_that_others_can_read(tmp_path: Path) -> None:
    for name in ("token", "keys"):
        (tmp_path / name).write_text("0123456789abcdef")
        (tmp_path / name).chmod(0o644)
    path = write_cluster(tmp_path, "x/y", node(), security={"token_file": "token"}, api={"keys_file": "keys"})
    token, keys = wrong(security(subject(path, 0)))
    assert token.status == "error"
    assert token.what == (
        f"{tmp_path / 'token'} (security.token_file) can be read by other users of this machine (mode 644)"
    )
    assert token.mend == f"chmod 600 {tmp_path / 'token'}"
    assert keys.why == "whoever has an account here can use the API with your keys"
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "keys").chmod(0o600)
    assert not wrong(security(subject(path, 0)))


def test_a_cluster_without_any_credential(tmp_path: Path) -> None:
    found = only(security(subject(write_cluster(tmp_path, "x/y", LAN))))
    assert found.status == "error"
    assert "is reachable from other machines" in found.what
    assert found.mend.startswith(f"umask 077 && openssl rand -hex 32 > {tmp_path}/cluster.token ")


def test_what_goes_unencrypted_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_TOKEN", "0123456789abcdef")
    found = only(security(subject(write_cluster(tmp_path, "x/y", LAN))))
    assert (found.status, found.what) == ("warning", "what the nodes send each other is not encrypted")
    (chosen,) = security(subject(write_cluster(tmp_path, "x/y", LAN, security={"allow_plaintext": True})))
    assert (chosen.status, chosen.what) == (
        "fine",
        "a token is set, and the file says that it may go unencrypted",
    )


CERTS = {"tls": {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "certs/{name}.key"}}
Spoil = Callable[[Cluster], object]
SPOILED: dict[str, tuple[Spoil, str, str]] = {
    "expired": (
        lambda c: c.expired("n0"),
        f"n0.pem expired on {NOW - 10 * DAY:%Y-%m-%d}",
        "macrame certs make",
    ),
    "early": (lambda c: c.not_yet_valid("n0"), "and the clock here says", "sudo timedatectl set-ntp true"),
    "readable key": (
        lambda c: c.node("n0").key.chmod(0o644),
        "n0.key (security.tls.key) can be read by other users of this machine",
        "chmod 600 ",
    ),
    "missing": (
        lambda c: c.node("n0").cert.unlink(),
        "cannot be read: No such file or directory",
        "macrame certs",
    ),
    "another's": (
        lambda c: c.node("n0", of="n9"),
        "is not for the node 'n0' but for n9",
        "macrame certs make",
    ),
    "soon over": (lambda c: c.node("n0", life=9 * DAY), "expires on ", "macrame certs make"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_certificates_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    spoil, what, mend = SPOILED[kind]
    spoil(Cluster(tmp_path / "certs"))
    found = only(security(subject(write_cluster(tmp_path, "x/y", node(name="n0"), security=CERTS), 0)))
    assert found.check == "certificates"
    assert what in found.what
    assert found.mend.startswith(mend)


def test_a_good_certificate(tmp_path: Path) -> None:
    Cluster(tmp_path / "certs").node("n0")
    (found,) = security(subject(write_cluster(tmp_path, "x/y", node(name="n0"), security=CERTS), 0))
    assert (found.check, found.status) == ("certificates", "fine")


def _copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_a_model_file_that_was_cut_short(tmp_path: Path, tiny: Path) -> None:
    folder = _copied(tiny, tmp_path)
    weights = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(weights, weights.stat().st_size - 1000)
    found = only(model(subject(write_cluster(tmp_path, folder, node()), 0)))
    assert f"{weights} is truncated: " in found.what
    assert found.mend.startswith(f"copy the model to {folder} again: rsync ")


def test_a_model_without_weights_or_tokenizer(tmp_path: Path, tiny: Path) -> None:
    folder = _copied(tiny, tmp_path)
    for path in (*folder.glob("*.safetensors"), *folder.glob("tokenizer*")):
        path.unlink()
    weights, tokenizer = wrong(model(subject(write_cluster(tmp_path, folder, node()), 0)))
    assert "no model*.safetensors" in weights.what
    assert tokenizer.what == f"{folder} has no tokenizer (tokenizer.json or another)"


def test_a_model_that_is_nowhere_and_one_of_the_hub(tmp_path: Path) -> None:
    found = only(model(subject(write_cluster(tmp_path, "/nowhere/tiny", node()), 0)))
    assert "there is no model folder /nowhere/tiny" in found.what
    (absent,) = model(subject(write_cluster(tmp_path, "nobody/nothing", node()), 0))
    assert (absent.status, absent.what) == (
        "skipped",
        "nobody/nothing is not here yet: each node fetches its own layers when it starts",
    )


def test_an_adapter_that_is_not_there(tmp_path: Path, tiny: Path) -> None:
    load = {"adapters": [{"name": "poet", "path": "poet"}]}
    found = only(model(subject(write_cluster(tmp_path, tiny, node(), load=load), 0)))
    assert found.what == f"the adapter 'poet' has no {tmp_path / 'poet' / 'adapters.safetensors'}"


def test_a_model_that_does_not_fit(tmp_path: Path, tiny: Path) -> None:
    small = node(memory_gb=0.001, name="tiny mac")
    found = only(plan(subject(write_cluster(tmp_path, tiny, small), 0)))
    assert found.status == "error"
    assert "plan-dry-run --config" in found.mend
    (good,) = plan(subject(write_cluster(tmp_path, tiny, node(name="mac")), 0))
    assert (good.status, good.what) == ("fine", "the model fits: mac 0:5")
    (unknown,) = plan(subject(write_cluster(tmp_path, tiny, {"host": "192.0.2.9"})))
    assert unknown.status == "skipped"
    assert "memory_gb is missing" in unknown.what


def drafted(tmp_path: Path, tiny: Path, draft: object, memory_gb: float = 16) -> Path:
    """Two nodes, of which the first may hold a draft model."""
    nodes = [node(memory_gb=memory_gb, name="mac"), {"host": "192.0.2.9", "memory_gb": 0.001, "use": False}]
    speculation = {"method": "draft", "draft_model": str(draft)}
    lan = {"security": {"allow_plaintext": True}}
    return write_cluster(tmp_path, tiny, *nodes, context=1024, speculation=speculation, **lan)


def test_a_draft_model_takes_its_part(tmp_path: Path, tiny: Path) -> None:
    """As the head plans: a machine that holds the model alone is too small for both."""
    assert not wrong(plan(subject(write_cluster(tmp_path, tiny, node(memory_gb=0.05), context=1024), 0)))
    draft = _copied(tiny, tmp_path)
    found = only(plan(subject(drafted(tmp_path, tiny, draft, memory_gb=0.05), 0)))
    assert found.status == "error"
    assert "without the draft model, which takes" in found.mend
    (good,) = plan(subject(drafted(tmp_path, tiny, draft), 0))
    assert good.what == "the model fits: mac 0:5, and the draft model on mac"


def test_a_draft_model_that_cannot_be_used(tmp_path: Path, tiny: Path) -> None:
    other = _copied(tiny, tmp_path)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {f"{key}x": n for key, n in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = only(plan(subject(drafted(tmp_path, tiny, other), 0)))
    assert found.status == "error"
    assert f"its vocabulary is not that of {tiny}" in found.what
    found = only(plan(subject(drafted(tmp_path, tiny, "/nowhere/draft"), 0)))
    assert "there is no model folder /nowhere/draft" in found.what
    for draft, rank, what in (
        ("/nowhere/draft", 1, "the draft model /nowhere/draft is rank 0's, and not here"),
        ("nobody/nothing", 0, "the draft model nobody/nothing is not here: plan-dry-run --config "),
    ):
        (unknown,) = plan(subject(drafted(tmp_path, tiny, draft), rank))
        assert unknown.status == "skipped"
        assert unknown.what.startswith(what)
