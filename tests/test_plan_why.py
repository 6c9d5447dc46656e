"""What `plan-dry-run` says of why, in its text and in its JSON."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.dry_run import main
from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from shard_loader.cuts import proofs_of
from tests.fake_models import llama_config
from tests.test_dry_run import KEYS, layers, run, write_config


@pytest.fixture(scope="module", autouse=True)
def proven() -> None:
    """The cuts of the model are proven before."""
    assert all(proof.exact for proof in proofs_of(llama_config(9)))


def test_the_text_says_why_in_a_line_for_each_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path))
    assert main(["--config", path]) == EXIT_OK
    short = capsys.readouterr().out
    why = short[short.index("\nwhy:\n") :]
    assert re.search(r"^  mini +has every layer: no ring of more nodes is better$", why, re.M)
    assert re.search(r"^  air +unused: [\d.]+ ms a token slower with it at best", why, re.M)
    assert "what would help: " in why
    assert main(["--config", path, "--why", "--layers", "air=0:2", "mini=2:5"]) == EXIT_OK
    full = capsys.readouterr().out
    assert re.search(r"^  air +its layers are forced to 0:2$", full, re.M)
    assert re.search(r"^what would help:\n  .*: (nothing|from [\d.]+ tok/s to [\d.]+ tok/s)$", full, re.M)


def test_json_has_the_account_only_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, asked = (run(tmp_path, capsys, *flags)[1] for flags in ([], ["--why"]))
    assert set(asked) == KEYS | {"why"}
    assert {key: value for key, value in asked.items() if key != "why"} == plain
    assert set(asked["why"]) == {"objective", "nodes", "unused", "what_if", "note", "remedies"}
    assert [entry["node"] for entry in asked["why"]["nodes"]] == list(layers(asked))
    code, data, _ = run(tmp_path, capsys, "--why", "--context", "100000000")
    assert code == EXIT_DOES_NOT_FIT
    assert set(data["refusal"]) == {"reason", "missing_bytes", "advice"}
    kinds = [remedy["kind"] for remedy in data["why"]["remedies"]]
    assert {"context", "node"} <= set(kinds)
    assert all(remedy["text"] and isinstance(remedy["lines"], list) for remedy in data["why"]["remedies"])


def test_a_refusal_lists_what_would_make_it_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_config(tmp_path))
    context = 26_000_000
    assert main(["--config", path, "--context", str(context)]) == EXIT_DOES_NOT_FIT
    text = capsys.readouterr().out
    listed = text[text.index("what would make it fit, each by itself:") :]
    most = int(re.findall(r"- lower --context to (\d+)$", listed, re.M)[0])
    assert run(tmp_path, capsys, "--context", str(most))[0] == EXIT_OK
    assert run(tmp_path, capsys, "--context", str(most + 256))[0] == EXIT_DOES_NOT_FIT
