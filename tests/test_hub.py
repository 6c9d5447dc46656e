from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shard_loader.hub import find_model
from shard_loader.sources import HubError

HUB_ID = "some-org/Some-Model-8bit"


def find(model: str, base: Path, **options: Any) -> Path:
    return find_model(model, base, root=base / "macrame", **options).folder


def make_model(folder: Path, files: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    for name, content in (files or {"config.json": {}, "model.safetensors": {}}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def make_cached(cache: Path, files: dict[str, Any]) -> Path:
    """A snapshot as the Hugging Face cache keeps it."""
    repo = cache / f"models--{HUB_ID.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return make_model(repo / "snapshots" / ("0" * 40), files)


def test_a_relative_path_is_looked_up_beside_the_config_then_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    there = make_model(work / "models" / "m")
    monkeypatch.chdir(work)
    assert find("models/m", base) == there
    here = make_model(base / "models" / "m")
    assert find("models/m", base) == here
    assert find("./models/m", base) == here
    assert find(str(there), base) == there


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/m", Path("/")) == make_model(tmp_path / "m") if (tmp_path / "m").exists() else True
    folder = make_model(tmp_path / "n")
    assert find("~/n", tmp_path / "base") == folder


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {"notes.json": {}})
    with pytest.raises(
        HubError, match=r"/m has no config\.json: a model folder holds config\.json and safetensors"
    ):
        find("m", tmp_path)


@pytest.mark.parametrize("model", ["", "  "])
def test_an_empty_model_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the model is empty: name a folder or a hub id"):
        find(model, tmp_path)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nothing", "../x", "a/b/c", "a b", "org/../m", "~/nothing"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"there is no model folder .* is no hub id"):
        find(model, tmp_path)


def test_a_cached_snapshot_is_used_without_a_network(tmp_path: Path) -> None:
    snapshot = make_cached(tmp_path, {"config.json": {}, "model.safetensors": {}})
    assert find(HUB_ID, tmp_path / "base", cache_dir=tmp_path) == snapshot


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {}},
        {"model.safetensors": {}},
        {"config.json": {}, "model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": {}},
        {"config.json": {}, "model.safetensors.index.json": [], "model-00001-of-00002.safetensors": {}},
    ],
    ids=["no weights", "no config", "a file of the index is missing", "broken index"],
)
def test_an_incomplete_snapshot_is_not_used(files: dict[str, Any], tmp_path: Path) -> None:
    make_cached(tmp_path, files)
    with pytest.raises(HubError, match=f"{HUB_ID} is not in the local cache, and HF_HUB_OFFLINE keeps"):
        find(HUB_ID, tmp_path / "base", cache_dir=tmp_path)


def test_a_snapshot_of_another_revision_is_not_used(tmp_path: Path) -> None:
    make_cached(tmp_path, {"config.json": {}, "model.safetensors": {}})
    here = find_model(HUB_ID, tmp_path, revision="0" * 40, cache_dir=tmp_path, root=tmp_path)
    assert here.revision == "0" * 40
    with pytest.raises(HubError, match=f"{HUB_ID} is not in the local cache, and HF_HUB_OFFLINE keeps"):
        find(HUB_ID, tmp_path / "base", cache_dir=tmp_path, revision="1" * 40)


@pytest.mark.parametrize("revision", ["main", "../../x", "0" * 39, "Z" * 40])
def test_a_revision_is_a_commit(revision: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"is no revision of .*: a commit has 40 hex digits"):
        find(HUB_ID, tmp_path, cache_dir=tmp_path, revision=revision)


def test_nothing_is_written_for_a_folder_or_a_snapshot(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    snapshot = make_cached(tmp_path, {"config.json": {}, "model.safetensors": {}})
    before = sorted(tmp_path.rglob("*"))
    assert find("m", tmp_path) == folder
    assert find(HUB_ID, tmp_path, cache_dir=tmp_path) == snapshot
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("model", ["a--b", "org/x..y", "org/name.git"])
def test_an_id_that_no_hub_takes_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=f"'{model}' is no hub id: "):
        find(model, tmp_path, cache_dir=tmp_path)
