from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.quantize_parts import copy_others, others_bytes
from planner.embedding_files import (
    EmbeddingModel,
    NoEmbeddingsError,
    is_embedding_model,
    read_embedding_model,
)
from shard_loader.store import FileEntry, Manifest, Store, is_file_name
from tests.embedding_models import write_embedding_files


def write(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"} | (config or {})))
    return write_embedding_files(folder, **options)


def edit(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


def why_not(folder: Path) -> str:
    with pytest.raises(NoEmbeddingsError) as caught:
        read_embedding_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls"])
def test_what_the_files_say(pooling: str, tmp_path: Path) -> None:
    folder = write(tmp_path, pooling=pooling, width=96)
    assert read_embedding_model(folder) == EmbeddingModel(pooling, 96, is_normalised=True)
    folder = write(tmp_path, pooling=pooling, is_normalised=False)
    assert read_embedding_model(folder) == EmbeddingModel(pooling, 64, is_normalised=False)


def test_a_pooling_that_is_named(tmp_path: Path) -> None:
    """As newer sentence-transformers write it."""
    write(tmp_path)
    content = {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert read_embedding_model(tmp_path) == EmbeddingModel("mean", 32, is_normalised=True)


def test_how_texts_are_prepared(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path / "sentence_bert_config.json", max_seq_length=77, do_lower_case=True)
    prompts = {"query": "Query: ", "document": ""}
    edit(tmp_path / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=None)
    plain = EmbeddingModel("lasttoken", 64, is_normalised=True, max_tokens=77, is_lowered=True)
    assert read_embedding_model(tmp_path) == plain
    edit(tmp_path / "config_sentence_transformers.json", default_prompt_name="query")
    assert read_embedding_model(tmp_path).prefix == "Query: "
    edit(tmp_path / "1_Pooling" / "config.json", include_prompt=False)
    assert "leaves the default prompt out of the pooling" in why_not(tmp_path)


def test_a_model_without_these_files_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not is_embedding_model(tmp_path)
    told = why_not(tmp_path)
    assert told.startswith("its files have no modules.json")
    assert (
        "copy modules.json and 1_Pooling/config.json from the original into its folder on every node" in told
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"is_causal": False}, "its config.json has is_causal = false"),
        ({"use_bidirectional_attention": True}, "its config.json has use_bidirectional_attention"),
        ({"auto_map": {"AutoModel": "m.Own"}}, "its config.json has auto_map, code of its own"),
    ],
)
def test_attention_that_looks_ahead_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in why_not(write(tmp_path, config))


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"pooling_mode_lasttoken": False}, "asks for the pooling of nothing"),
        ({"pooling_mode_mean_tokens": True}, "asks for the pooling mean and lasttoken, and only one of"),
        ({"pooling_mode": "weightedmean"}, "asks for the pooling weightedmean, and only one of lasttoken,"),
        ({"word_embedding_dimension": None}, "has no word_embedding_dimension: download the model again"),
    ],
)
def test_other_poolings_are_refused(entries: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path / "1_Pooling" / "config.json", **entries)
    assert reason in why_not(tmp_path)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    told = why_not(tmp_path)
    assert "names Transformer, Pooling, Dense, and only Transformer, Pooling and Normalize, in this" in told
    (tmp_path / "modules.json").write_text("{")
    assert why_not(tmp_path).startswith("its modules.json cannot be read (")


def test_a_file_that_did_not_come_along_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    assert why_not(tmp_path).startswith("its modules.json names 1_Pooling/config.json, which is not there")


@pytest.mark.parametrize("name", ["../config.json", "a/config.json", "1_Pooling/x.json", "1_/config.json"])
def test_no_other_file_in_a_folder_belongs_to_a_store(name: str) -> None:
    assert not is_file_name(name)
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is no file of a model folder")):
        Manifest("m", "0" * 40, {name: FileEntry(name, 1)})


def test_a_store_keeps_the_pooling_in_its_folder(tmp_path: Path) -> None:
    entry = FileEntry("1_Pooling/config.json", 2)
    store = Store.create(tmp_path / ("0" * 40), Manifest("m", "0" * 40, {entry.name: entry}))
    assert not store.has(entry)
    assert store.add_small(entry, b"{}")
    assert store.has(entry)
    assert (store.folder / "1_Pooling" / "config.json").read_bytes() == b"{}"


def test_a_quantised_model_stays_an_embedding_model(tmp_path: Path) -> None:
    source, made = write(tmp_path / "source"), tmp_path / "made"
    made.mkdir()
    copy_others(source, made, "card")
    (made / "config.json").write_text((source / "config.json").read_text())  # else written anew
    assert read_embedding_model(made) == read_embedding_model(source)
    copied = (
        path for path in made.rglob("*") if path.is_file() and path.parent / path.name != made / "config.json"
    )
    assert others_bytes(source, "card") == sum(path.stat().st_size for path in copied)
