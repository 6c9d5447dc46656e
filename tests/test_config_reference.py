"""The tables of docs/configuration.md are those of the code: keys, kinds, limits, defaults, environment."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import config_reference as reference
from cluster.config import read_config
from cluster.config_read import ConfigError, Table
from shard_loader.shard_cache import DEFAULT_MAX_BYTES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "configuration.md"
REMAKE = "python -m cluster.config_reference docs/configuration.md"


def test_every_key_of_the_code_is_explained_and_no_other() -> None:
    known, explained = set(reference.recorded()), set(reference.KEYS)
    assert known == explained, (
        f"put {known ^ explained} right in cluster/config_reference.py, then run {REMAKE}"
    )


def test_every_key_has_a_kind() -> None:
    for path, kind in reference.recorded().items():
        assert kind or reference.KEYS[path].kind, path


def test_the_document_is_what_the_code_says() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert reference.rewrite(text) == text, f"run {REMAKE}"


def test_every_key_stands_in_the_document_once() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    places = re.findall(r"<!-- keys: ?(\S*) -->", text)
    wanted = ["", "nodes[]", "links[]", "api", "security", "load", "speculation", "environment"]
    assert sorted(places) == sorted(wanted)
    assert len(re.findall(r"^\| `[a-z_.\[\]]+` \|.*\|.*\|.*\|$", text, flags=re.M)) == len(reference.KEYS)


def default_of(config: Any, path: str) -> Any:
    """What the code uses where a file does not say."""
    if path == "load.quantize.mode":
        return "affine"
    if path == "load.cache_gb":
        return DEFAULT_MAX_BYTES // 10**9
    value = config.nodes[0] if path.startswith("nodes[]") else config
    for name in path.removeprefix("nodes[]").lstrip(".").split("."):
        value = getattr(value, name)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", reference.KEYS)
def test_defaults_are_those_of_the_code(path: str) -> None:
    try:
        written = json.loads(reference.KEYS[path].default)
    except ValueError:
        return  # words
    if written == {}:
        return  # the parts have defaults of their own
    config = read_config(Table(Path("minimal"), "", reference.MINIMAL, tuple(reference.MINIMAL)))
    assert default_of(config, path) == written


@pytest.mark.parametrize(
    "path", ["model", "nodes", "nodes[].host", "links[].between", "load.adapters[].path"]
)
def test_what_is_needed_is_needed(path: str) -> None:
    assert reference.KEYS[path].default == "needed"
    content = json.loads(json.dumps(reference.EXAMPLE))
    *parents, last = path.replace("[]", ".0").split(".")
    place = content
    for part in parents:
        place = place[int(part) if part == "0" else part]
    del place[last]
    with pytest.raises(ConfigError):
        read_config(Table(Path("f"), "", content, tuple(reference.EXAMPLE)))


def test_every_environment_variable_is_explained() -> None:
    used = set()
    for package in ("deploy", "cluster", "shard_loader", "planner", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "config_reference.py":
                used |= set(re.findall(r"\bMACRAME_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    explained = set(reference.ENVIRONMENT)
    assert used == explained, f"put {used ^ explained} right in ENVIRONMENT there, then run {REMAKE}"
