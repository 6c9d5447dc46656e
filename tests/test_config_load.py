"""The `load` part of the cluster file: what is read, what is refused, what all nodes must agree on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, ConfigError, load_config
from planner.load_options import LoadOptions, Quantization


def load(folder: Path, part: Any) -> ClusterConfig:
    path = folder / "cluster.json"
    path.write_text(json.dumps({"model": "m", "nodes": [{"host": "localhost"}], "load": part}))
    return load_config(path)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({}, None),
        ({"quantize": None}, None),
        ({"quantize": {}}, Quantization(4, 64, "affine")),
        ({"quantize": {"bits": 8}}, Quantization(8, 64, "affine")),
        ({"quantize": {"bits": 3, "group_size": 128, "mode": "affine"}}, Quantization(3, 128, "affine")),
        ({"quantize": {"mode": "mxfp4"}}, Quantization(4, 32, "mxfp4")),
        ({"quantize": {"mode": "mxfp8"}}, Quantization(8, 32, "mxfp8")),
        ({"quantize": {"mode": "nvfp4", "group_size": 16}}, Quantization(4, 16, "nvfp4")),
    ],
)
def test_quantize(part: Any, expected: Quantization | None, tmp_path: Path) -> None:
    assert load(tmp_path, part).load.options == LoadOptions(expected)


def test_the_rest_is_read(tmp_path: Path) -> None:
    part = {
        "dtype": "bfloat16",
        "cache": False,
        "cache_dir": "/x",
        "cache_gb": 20,
        "adapters": [{"name": "sql", "path": "adapters/sql"}, {"name": "me/poet:v2", "path": "/a/poet"}],
    }
    config = load(tmp_path, part).load
    assert config.options == LoadOptions(dtype="bfloat16")
    assert (config.cache, config.cache_dir, config.cache_gb) == (False, "/x", 20.0)
    assert [(a.name, a.path) for a in config.adapters] == [("sql", "adapters/sql"), ("me/poet:v2", "/a/poet")]


WRONG: list[tuple[Any, str]] = [
    ({"quantize": 4}, r"load\.quantize = 4 must be a mapping"),
    (
        {"quantize": {"bits": 7}},
        r"load\.quantize\.bits = 7 must be one of 2, 3, 4, 5, 6, 8 in the mode",
    ),
    ({"quantize": {"bits": 4.0}}, r"bits = 4\.0 must be one of"),
    ({"quantize": {"bits": True}}, r"bits = true must be one of"),
    ({"quantize": {"group_size": 16}}, r"group_size = 16 must be one of 32, 64, 128 in the mode affine"),
    ({"quantize": {"mode": "mxfp4", "bits": 8}}, r"bits = 8 must be 4 in the mode mxfp4"),
    ({"quantize": {"mode": "nvfp4", "group_size": 64}}, r"group_size = 64 must be 16 in the mode nvfp4"),
    ({"quantize": {"mode": "mxfp5"}}, r'mode = "mxfp5" must be one of affine, mxfp4, mxfp8, nvfp4, the near'),
    ({"quantize": {"bit": 4}}, r'load\.quantize: unknown key "bit" .* nearest known key is "bits"'),
    ({"dtype": "fp16"}, r'load\.dtype = "fp16" must be one of bfloat16, float16, float32'),
    ({"cache": "yes"}, r'load\.cache = "yes" must be true or false'),
    ({"cache_gb": 0}, r"load\.cache_gb = 0 must be a number above 0"),
    ({"adapters": ["a"]}, r'load\.adapters\[0\] = "a" must be a mapping'),
    ({"adapters": [{"path": "a"}]}, r"load\.adapters\[0\]\.name is missing: it must name the adapter"),
    ({"adapters": [{"name": "a\tb", "path": "a"}]}, r"adapters\[0\]\.name"),
    (
        {"adapters": [{"name": "a"}]},
        r"load\.adapters\[0\]\.path is missing: it must be the folder of",
    ),
    ({"adapters": [{"name": "a", "path": "b"}] * 2}, r"adapters\[1\]\.name = \"a\" is given to two adapters"),
    ({"adapters": [{"name": "m", "path": "b"}]}, r"name = \"m\" is the model's own: choose another"),
]


@pytest.mark.parametrize(("part", "message"), WRONG)
def test_what_is_wrong_is_refused_with_key_and_value(part: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, part)


def test_options_of_other_callers_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^mode = 'int4' must be one of affine, mxfp4, mxfp8, nvfp4$"):
        Quantization.of("int4")
    with pytest.raises(ValueError, match=r"^group_size = 64 must be 32 in the mode mxfp8$"):
        Quantization(8, 64, "mxfp8")
    with pytest.raises(ValueError, match=r"^dtype = 'int8' must be one of bfloat16, float16, float32$"):
        LoadOptions(dtype="int8")


def test_the_digest_covers_what_changes_tokens_and_no_disk(tmp_path: Path) -> None:
    plain = load(tmp_path, {}).digest
    assert load(tmp_path, {"quantize": {}}).digest != plain
    assert load(tmp_path, {"dtype": "float16"}).digest != plain
    assert load(tmp_path, {"cache": True, "cache_dir": "/x", "cache_gb": 3}).digest == plain
    here, there = ({"adapters": [{"name": "a", "path": f"/{folder}/a"}]} for folder in ("here", "there"))
    assert load(tmp_path, here).digest == load(tmp_path, there).digest != plain
