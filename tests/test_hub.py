from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from shard_loader import hub
from shard_loader.hub import HubError, resolve_model

HUB_ID = "some-org/Some-Model-8bit"


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
    assert resolve_model("models/m", base) == there
    here = make_model(base / "models" / "m")
    assert resolve_model("models/m", base) == here
    assert resolve_model("./models/m", base) == here
    assert resolve_model(str(there), base) == there


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        resolve_model("~/m", Path("/")) == make_model(tmp_path / "m") if (tmp_path / "m").exists() else True
    )
    folder = make_model(tmp_path / "n")
    assert resolve_model("~/n", tmp_path / "base") == folder


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {"notes.json": {}})
    with pytest.raises(
        HubError, match=r"/m has no config\.json: a model folder holds config\.json and safetensors"
    ):
        resolve_model("m", tmp_path)


@pytest.mark.parametrize("model", ["", "  "])
def test_an_empty_model_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the model is empty: name a folder or a hub id"):
        resolve_model(model, tmp_path)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nothing", "../x", "a/b/c", "a b", "org/../m", "~/nothing"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"there is no model folder .* is no hub id"):
        resolve_model(model, tmp_path)


def test_a_cached_snapshot_is_used_without_a_network(tmp_path: Path) -> None:
    snapshot = make_cached(tmp_path, {"config.json": {}, "model.safetensors": {}})
    assert resolve_model(HUB_ID, tmp_path / "base", cache_dir=tmp_path) == snapshot


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"config.json": {}}, "model.safetensors"),
        ({"model.safetensors": {}}, "config.json"),
        (
            {
                "config.json": {},
                "model.safetensors.index.json": INDEX,
                "model-00001-of-00002.safetensors": {},
            },
            "model-00002-of-00002.safetensors",
        ),
        (
            {"config.json": {}, "model.safetensors.index.json": [], "model-00001-of-00002.safetensors": {}},
            "a readable model.safetensors.index.json",
        ),
    ],
    ids=["no weights", "no config", "a file of the index is missing", "broken index"],
)
def test_an_incomplete_snapshot_is_asked_for_again_and_then_named(
    files: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    make_cached(tmp_path, files)
    with pytest.raises(HubError, match=rf"{HUB_ID} lacks {missing}, here and .*`hf download {HUB_ID}`"):
        resolve_model(HUB_ID, tmp_path / "base", cache_dir=tmp_path)


def test_a_model_that_is_nowhere_says_so_offline(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=f"{HUB_ID} is not in the local cache and the Hugging Face hub cannot"):
        resolve_model(HUB_ID, tmp_path / "base", cache_dir=tmp_path)


def test_a_download_is_asked_for_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    downloaded = make_model(tmp_path / "downloaded")

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        if options.get("local_files_only"):
            raise hub.LocalEntryNotFoundError("not here")
        return str(downloaded)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve_model(HUB_ID, tmp_path) == downloaded
    assert [repo for repo, _ in asked] == [HUB_ID, HUB_ID]
    assert "model*.safetensors" in asked[1][1]["allow_patterns"]
    assert "*.py" not in asked[1][1]["allow_patterns"]


def failure(kind: type[Exception]) -> Exception:
    """The hub's errors want a response of the HTTP client of the day; nobody looks at it here."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            failure(RepositoryNotFoundError),
            "is neither a folder here nor a model on the Hugging Face hub",
        ),
        (failure(GatedRepoError), "asks you to accept its licence: .* then run `hf auth login`"),
        (OSError(28, "No space left on device"), "cannot be downloaded: .*No space left on device"),
        (ValueError("bad\nsecond line"), "cannot be downloaded: bad$"),
    ],
    ids=["unknown", "gated", "full disk", "other"],
)
def test_a_failed_download_is_one_sentence(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise hub.LocalEntryNotFoundError("not here") if options.get("local_files_only") else error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubError, match=f"{HUB_ID} {message}") as caught:
        resolve_model(HUB_ID, tmp_path)
    assert "\n" not in str(caught.value)
