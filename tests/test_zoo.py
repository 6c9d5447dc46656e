"""Every architecture of the installed mlx-lm, cut everywhere, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.zoo.configs import NO_BASELINE, module_names
from tests.zoo.run import EXACT, ONE_NODE, REFUSED, cut_sets

FAST = (
    "llama",
    "gemma3n",
    "deepseek_v41",
    "kimi_linear",
    "rwkv7",
    "hunyuan",
    "longcat_flash_ngram",
    "nanbeige",
)
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
    for verdict in verdicts:
        check(verdict)


def test_every_module_is_in_the_zoo() -> None:
    assert len(module_names()) == 126  # of mlx-lm 0.32.2; another release may have more


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
    for verdict in verdicts:
        check(verdict)
