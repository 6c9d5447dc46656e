"""The `speculation` part of the cluster file: what is read, what it comes to, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, ConfigError, SpeculationConfig, load_config
from deploy.up_files import hand_out


def load(folder: Path, part: Any) -> ClusterConfig:
    path = folder / "cluster.json"
    path.write_text(json.dumps({"model": "m", "nodes": [{"host": "localhost"}], "speculation": part}))
    return load_config(path)


@pytest.mark.parametrize("part", [None, {}, {"method": None}, {"method": "auto", "max_draft_tokens": 8}])
def test_without_a_word_all_that_needs_no_second_model(part: Any, tmp_path: Path) -> None:
    speculation = load(tmp_path, part).speculation
    assert speculation == SpeculationConfig()
    assert (speculation.is_on, speculation.drafter) == (True, None)


@pytest.mark.parametrize(
    ("method", "is_on", "drafter"),
    [("auto", True, "d"), ("draft", True, "d"), ("ngram", True, None), ("off", False, None)],
)
def test_who_drafts(method: str, is_on: bool, drafter: str | None, tmp_path: Path) -> None:
    part = {"method": method, "draft_model": "d", "max_draft_tokens": 3}
    speculation = load(tmp_path, part).speculation
    assert speculation == SpeculationConfig(method, "d", 3)
    assert (speculation.is_on, speculation.drafter) == (is_on, drafter)


def test_a_draft_model_alone_is_used(tmp_path: Path) -> None:
    assert load(tmp_path, {"draft_model": "d"}).speculation.drafter == "d"


WRONG: list[tuple[Any, str]] = [
    ("ngram", r'speculation = "ngram" must be a mapping'),
    (
        {"methods": "ngram"},
        r'speculation: unknown key "methods" with the value "ngram", the nearest known key is "method"',
    ),
    ({"draft_models": "d"}, r'the nearest known key is "draft_model"'),
    (
        {"method": "n-gram"},
        r'speculation\.method = "n-gram" must be one of auto, ngram, draft, off, the nearest is "ngram"',
    ),
    (
        {"method": "draft"},
        r'speculation\.draft_model is missing: it must name a folder or a hub id where the method is "draft"',
    ),
    (
        {"draft_model": "m"},
        r'speculation\.draft_model = "m" is the model itself: name a smaller one with its vocabulary',
    ),
    ({"draft_model": ""}, r'draft_model = "" must be a non-empty string'),
    ({"draft_model": 1}, r"draft_model = 1 must be a non-empty string"),
    ({"max_draft_tokens": 0}, r"max_draft_tokens = 0 must be a whole number from 1 to 64"),
    ({"max_draft_tokens": 65}, r"max_draft_tokens = 65 must be a whole number from 1 to 64"),
    ({"max_draft_tokens": True}, r"max_draft_tokens = true must be a whole number"),
]


@pytest.mark.parametrize(("part", "message"), WRONG)
def test_what_is_refused(part: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, part)


def test_nodes_need_not_agree_on_it(tmp_path: Path) -> None:
    """Only the head reads it, and tokens do not depend on it."""
    digest = load(tmp_path, {}).digest
    assert load(tmp_path, {"method": "off"}).digest == digest
    assert load(tmp_path, {"draft_model": "/x/d", "max_draft_tokens": 4}).digest == digest


def test_the_copy_that_rank_0_gets_names_the_folder_in_full(tmp_path: Path) -> None:
    """`macrame up` puts copies of the file elsewhere, where a relative path would lead nowhere."""
    (tmp_path / "small").mkdir()
    for named, told in (("small", str(tmp_path / "small")), ("org/small", "org/small")):
        config = load(tmp_path, {"draft_model": named, "max_draft_tokens": 3})
        document = json.loads(hand_out(config.path, None).document)
        assert document["speculation"] == {"draft_model": told, "max_draft_tokens": 3}
