"""Every architecture of the installed mlx-lm, cut everywhere, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from shard_loader.proof_store import find, mlx_lm_version
from shard_loader.rehearsal import Rehearsal, RehearsalError
from tests.zoo.configs import NO_BASELINE, module_names, zoo_config
from tests.zoo.run import EXACT, ONE_NODE, PARTLY, REFUSED, WRONG, Verdict, cut_sets
from tests.zoo.table import BEGIN, DEMO, END, PAGE, between, replaced, rows, summary

FAST = ("gemma3n", "kimi_k3", "nanbeige")
NUM_PROCESSES = 4


def run_zoo(names: Sequence[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.zoo.run", *names],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(verdict: dict[str, Any]) -> None:
    """No error that is not exactly zero, and no refusal that is not meant."""
    name, status = verdict["name"], verdict["status"]
    if name in NO_BASELINE:
        assert (status, verdict["reason"]) == (REFUSED, NO_BASELINE[name])
    elif name in ("iquestloopcoder", "nanbeige"):
        assert (status, verdict["legal"]) == (ONE_NODE, [])
    else:
        assert status == EXACT, verdict["reason"]
        assert verdict["errors"] == dict.fromkeys(verdict["errors"], 0.0)
        assert verdict["legal"] == list(range(1, verdict["num_layers"]))
        assert verdict["num_layers"] == 7


def test_a_few_of_the_zoo() -> None:
    verdicts = run_zoo(FAST)
    assert [verdict["name"] for verdict in verdicts] == list(FAST)
    table = table_rows()
    for verdict in verdicts:
        check(verdict)
        assert rows([Verdict(**verdict)])[-1] == table[verdict["name"]]


def test_every_module_is_in_the_zoo() -> None:
    assert len(module_names()) == 126  # of mlx-lm 0.32.2; another release may have more


def table_rows() -> dict[str, str]:
    """The page's line for each architecture."""
    lines = between(PAGE.read_text()).splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "---" not in line}


def test_the_page_has_a_line_for_every_module() -> None:
    table = table_rows()
    assert next(iter(table)) == "architecture"
    assert list(table)[1:] == module_names()
    assert f"mlx-lm {mlx_lm_version()}: 126 model modules, 121 exact at every cut" in PAGE.read_text()


def test_what_is_shipped_is_what_the_page_says() -> None:
    table = table_rows()
    for name in module_names():
        if name in NO_BASELINE:
            assert "| refused |" in table[name]
            continue
        proofs = find(zoo_config(name), None)
        assert proofs is not None
        assert len(proofs) == 6
        assert all(proof.exact for proof in proofs) == ("| exact at every cut |" in table[name])
        assert any(proof.exact for proof in proofs) == ("| one node only |" not in table[name])
    demo = find(json.loads(DEMO.read_text()), None)
    assert demo is not None
    assert [proof.exact for proof in demo] == [True] * 8


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(NO_BASELINE.keys() - {"olmo"}))
def test_what_has_no_baseline_does_not_run(name: str) -> None:
    with pytest.raises(RehearsalError, match="no tiny model of this config can be built"):
        Rehearsal(zoo_config(name))


def test_writing_the_table() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    verdicts = [
        Verdict("a", EXACT, 3, [1, 2]),
        Verdict("b", PARTLY, 3, [1], "why"),
        Verdict("c", ONE_NODE, 3, [], "loops"),
        Verdict("d", REFUSED, reason="no CPU form"),
    ]
    text = "\n".join([summary(verdicts, "1.0"), *rows(verdicts)])
    assert between(replaced(page, text)) == text
    assert replaced(page, text).endswith(f"{END}\nafter\n")
    assert text.splitlines()[0] == (
        "mlx-lm 1.0: 4 model modules, 1 exact at every cut, 1 at some cuts, 1 for one node only, 1 refused."
    )
    assert text.splitlines()[3:] == [
        "| a | 3 | exact at every cut |  |",
        "| b | 3 | exact before layers 1 | why |",
        "| c | 3 | one node only | loops |",
        "| d |  | refused | no CPU form |",
    ]
    with pytest.raises(KeyError):
        rows([Verdict("e", WRONG, 3)])


def test_what_is_tried() -> None:
    assert list(cut_sets(7))[6:] == [[2, 5], [1, 2, 4, 6], [1, 2, 3, 4, 5, 6]]
    assert list(cut_sets(2)) == [[1]]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(NUM_PROCESSES))
def test_the_whole_zoo(part: int) -> None:
    names = module_names()[part::NUM_PROCESSES]
    verdicts = run_zoo(names)
    assert [verdict["name"] for verdict in verdicts] == names
    table = table_rows()
    for verdict in verdicts:
        check(verdict)
        assert rows([Verdict(**verdict)])[-1] == table[verdict["name"]]
