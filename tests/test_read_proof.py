"""Of which architectures prompts are read together, and that the proof would find what is wrong."""

from __future__ import annotations

import json

import pytest

from shard_loader import batch_state
from shard_loader.batch_proof import TOLERANCE
from shard_loader.proof_store import SHIPPED, find_rows
from shard_loader.read_proof import read_error
from shard_loader.rehearsal import Rehearsal
from tests.zoo.configs import zoo_config


@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("gpt_oss", True),
        ("mamba2", True),
        ("plamo3", False),
        pytest.param("qwen3_next", True, marks=pytest.mark.long),
        pytest.param("phi3small", False, marks=pytest.mark.long),
    ],
)
def test_what_is_shipped_is_what_is_found(name: str, is_right: bool) -> None:
    """plamo3 is wrong behind a full window by itself; phi3small cannot mask rows of different positions."""
    config = zoo_config(name)
    error = read_error(Rehearsal(config))
    assert (error is not None and error <= TOLERANCE) is is_right
    shipped = find_rows(config)
    assert shipped is not None
    assert shipped.read_together is is_right


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.long), "gpt_oss"])
def test_cuts_add_nothing(name: str) -> None:
    error = read_error(Rehearsal(zoo_config(name)), [2, 5])
    assert error is not None
    assert error <= 1e-5


def test_a_window_that_is_not_in_order_is_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's mask of several tokens is wrong there, and a row that is short would not see its oldest."""
    rehearsal = Rehearsal(zoo_config("gpt_oss"))
    monkeypatch.setattr(batch_state, "make_room", lambda caches, num_tokens: None)
    error = read_error(rehearsal)
    assert error is not None
    assert error > 0.1


def test_who_cannot_share_a_pass_cannot_share_a_prompts() -> None:
    patterns = json.loads(SHIPPED.read_text())["patterns"].values()
    assert all(found["batched"] for found in patterns if found["read_together"])
